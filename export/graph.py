"""A student folder as three static graphs: text encoder, UNet and VAE decoder, as plain modules and as ONNX files."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.errors import EdgeFusionError, RecipeError, StageError
from export.decode_tiles import TiledDecoder
from export.exact import with_small_upsampling, without_einsum
from export.guidance import guidance_input
from export.onnx_file import publish_onnx
from export.refusal import place_in, reason


class _TextEncoder(nn.Module):
    """Token ids B T (int64) to text states B T D."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids)[0]


class _Unet(nn.Module):
    """Latents B C H W, timestep 1 (float), text states B T D and, where guidance is an input, its embedding 1 E to the prediction B C H W."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = without_einsum(unet)

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, guidance: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.unet(latent, timestep, text, timestep_cond=guidance, return_dict=False)[0]


class _Decoder(nn.Module):
    """Scaled latents B C H W to pictures B 3 H W in [0, 1]; `tiles`: latents of a tile and of what two share."""

    def __init__(self, vae: Any, tiles: tuple[int, int] | None) -> None:
        super().__init__()
        self.decoder, self.scale = with_small_upsampling(vae.decoder), vae.config.scaling_factor
        if tiles is not None:
            self.decoder = TiledDecoder(self.decoder, *tiles)
        self.post = getattr(vae, "post_quant_conv", None)  # AutoencoderTiny has none

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        latent = latent / self.scale
        if self.post is not None:
            latent = self.post(latent)
        return (self.decoder(latent) / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Graph:
    """A module with example inputs that fix its shapes."""

    name: str
    module: nn.Module
    inputs: dict[str, torch.Tensor]
    output: str


def graphs_of(
    pipeline: Any, size_px: int | None = None, batch_images: int = 1, guidance: dict[str, Any] | None = None
) -> list[Graph]:
    """The three graphs of a float32 student pipeline, for `batch_images` pictures of `size_px` (the student's own size if left out).

    With `guidance` (`guidance_of` the student) the UNet's has its embedding as an input: the host computes it, so that no graph holds angles
    of thousands of radians.
    """
    unet, tokenizer = pipeline.unet, pipeline.tokenizer
    side, channels = latent_side(pipeline, size_px), unet.config.in_channels
    width = pipeline.text_encoder.config.hidden_size
    length = tokenizer.model_max_length
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(batch_images, channels, side, side, generator=draw)
    text = torch.randn(batch_images, length, width, generator=draw)
    more = {name: torch.from_numpy(value) for name, value in guidance_input({"guidance": guidance}).items()}
    words = ["a picture"] * batch_images
    tokens = torch.tensor(tokenizer(words, padding="max_length", max_length=length)["input_ids"])
    return [
        Graph("text_encoder", _TextEncoder(pipeline.text_encoder).eval(), {"input_ids": tokens}, "text"),
        Graph(
            "unet",
            _Unet(unet).eval(),
            {"latent": latent, "timestep": torch.tensor([999.0]), "text": text, **more},
            "prediction",
        ),
        decoder_graph(pipeline.vae, latent),
    ]


def latent_side(pipeline: Any, size_px: int | None) -> int:
    """Side of the latents of pictures of `size_px`. Raises RecipeError for a size that the VAE or the UNet cannot halve as often as it must."""
    if size_px is None:
        return pipeline.unet.config.sample_size
    vae, unet = (2 ** (len(part.config.block_out_channels) - 1) for part in (pipeline.vae, pipeline.unet))
    multiple = vae * unet
    if size_px % multiple:
        near = max(multiple, round(size_px / multiple) * multiple)
        raise RecipeError(
            f"export.size_px is {size_px}, and this student draws multiples of {multiple} pixels: a latent is {vae} pixels wide, and its "
            f"UNet halves latents {unet.bit_length() - 1} times",
            remedy=f"Set export.size_px={near}, or leave it out for {pipeline.unet.config.sample_size * vae}",
        )
    return size_px // vae


def decoder_graph(vae: Any, latent: torch.Tensor, tiles: tuple[int, int] | None = None) -> Graph:
    """The graph of a diffusers autoencoder's decoder (AutoencoderKL, AutoencoderTiny) for latents of that shape, whole or in tiles."""
    return Graph("vae_decoder", _Decoder(vae, tiles).eval(), {"latent": latent}, "picture")


def to_onnx(graph: Graph, path: Path, rewrite: bool = True) -> None:
    """Write one graph through torch.export, by `publish_onnx`; static shapes. Raises StageError if the model does not lower.

    Without `rewrite` constants are folded and nothing else: the rewriter's time grows with the square of the nodes, so that a
    finely tiled UNet would take it many minutes.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.module,
                tuple(graph.inputs.values()),
                input_names=list(graph.inputs),
                output_names=[graph.output],
                opset_version=21,
                dynamo=True,
                optimize=rewrite,
                verbose=False,
            )
            if program is None:
                raise RuntimeError("the exporter returned no program")
            if not rewrite:
                from onnxscript.optimizer import fold_constants

                fold_constants(program.model)
            publish_onnx(path, program.model)
    except EdgeFusionError:
        raise
    except Exception as error:
        place = place_in(graph.module, error)
        raise StageError(
            f"{graph.name} does not lower to ONNX: {f'in {place}: ' if place else ''}{reason(error)}",
            remedy="Give a student whose module there is made of operators that ONNX has; --debug shows the exporter's report",
        ) from error
