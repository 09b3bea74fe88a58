"""Full-size models with random weights, and the same weights in each rival's form. A piece a process: `python fullsize_models.py PIECE FOLDER SIZE_PX`.

Costs depend on shapes, not on what was learnt; pictures of random weights say nothing of quality.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from export.blocks import read_architecture
from export.bundle import export_student
from export.graph import Graph, decoder_graph, to_onnx
from export.quantise_openvino import quantise_openvino
from export.recipe import ExportRecipe
from factory.models import quiet, resolve

STEPS = 2
TOKENS = 77
BUILDS = (
    "w8bf16",
    {"name": "int8", "text_encoder": "bf16", "unet": "w8a8bf16", "vae_decoder": "w8a8bf16"},
)
PIECES = ("student", "bundle", "small", "genai", "ort")

PROMPTS = ("a red apple on a white table", "a fox in the snow", "a rocket over the sea", "an owl on a branch")


def text_encoder() -> Any:
    """CLIP ViT-L/14's text tower, as in Stable Diffusion 1.5."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=TOKENS,
            projection_dim=768,
            hidden_act="quick_gelu",
        )
    ).eval()


def autoencoder() -> Any:
    """Stable Diffusion 1.5's. Source: its published vae/config.json."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=512,
        scaling_factor=0.18215,
    ).eval()


def small_autoencoder() -> Any:
    """TAESD's shape, diffusers' default."""
    return AutoencoderTiny().eval()


def unet(name: str, size_px: int) -> Any:
    config, side, _ = read_architecture(name, size_px)
    found: Any = UNet2DConditionModel.from_config(config | {"sample_size": side})
    return found.eval()


def scheduler() -> LCMScheduler:
    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False)


def make_student(folder: Path, size_px: int) -> None:
    """A BK-SDM-Tiny pipeline folder. The tokenizer is the zoo's, padded to 77: its words cost what any others do."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(str(Path(resolve("zoo:student-fewstep")) / "tokenizer"))
    tokenizer.model_max_length = TOKENS
    pipeline = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer,
        unet=unet("bk-sdm-tiny", size_px),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder / "student")


def make_bundle(folder: Path) -> None:
    """Ours, by the exporter as anyone runs it; the gates do not judge random weights but for numbers and blank pictures."""
    gates = {"half_snr_db": 0, "quantised_psnr_db": 0, "worst_psnr_db": 0, "ssim": None, "block_snr_db": None}
    settings = {"targets": ["openvino"], "precisions": list(BUILDS), "steps": STEPS, "gates": gates}
    few = {"calibration_prompts": 1, "parity_prompts": 1, "latency_runs": 1}
    recipe = ExportRecipe.model_validate({**settings, **few})
    export_student(folder / "student", PROMPTS, recipe, folder / "bundle", lambda what: print(what, flush=True))


def make_small(folder: Path, size_px: int) -> None:
    """The small decoder as each of our builds would have it."""
    torch.manual_seed(1)
    side = size_px // 8
    graph = decoder_graph(small_autoencoder(), torch.randn(1, 4, side, side))
    place = folder / "small"
    to_onnx(graph, place / "vae_decoder.onnx")
    rows = [{"latent": torch.randn(1, 4, side, side).numpy()}]
    for build, precision in (("w8bf16", "bf16"), ("int8", "w8a8bf16")):
        quantise_openvino(place / "vae_decoder.onnx", place / f"{build}.{precision}.xml", precision, rows, [])


class _Plain(torch.nn.Module):
    """A module by its first output, with nothing rewritten."""

    def __init__(self, run: Any, part: Any) -> None:
        super().__init__()
        self.part, self.run = part, run

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self.part, *inputs)


def plain_graphs(
    folder: Path, size_px: int
) -> dict[str, tuple[torch.nn.Module, dict[str, torch.Tensor], tuple[str, ...]]]:
    """The student as its makers wrote it, for the rivals: module, example inputs, output names."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        folder / "student", torch_dtype=torch.float32, safety_checker=None
    )
    side = size_px // 8
    latent, text = torch.randn(1, 4, side, side), torch.randn(1, TOKENS, 768)
    words = torch.randint(0, 1000, (1, TOKENS))
    return {
        "text_encoder": (
            _Plain(lambda m, ids: tuple(m(ids)[:2]), pipeline.text_encoder),
            {"input_ids": words},
            ("last_hidden_state", "pooler_output"),
        ),
        "unet": (
            _Plain(lambda m, x, t, c: m(x, t, c, return_dict=False)[0], pipeline.unet),
            {"sample": latent, "timestep": torch.tensor([999.0]), "encoder_hidden_states": text},
            ("out_sample",),
        ),
        "vae_decoder": (
            _Plain(lambda m, z: m.decode(z, return_dict=False)[0], pipeline.vae),
            {"latent_sample": latent},
            ("sample",),
        ),
    }


def make_genai(folder: Path, size_px: int) -> None:
    """The folder that OpenVINO GenAI reads, laid out as optimum-intel lays it, fp16 weights, static shapes (to its advantage)."""
    import openvino
    import openvino_tokenizers

    place = folder / "genai"
    for name, (module, inputs, outputs) in plain_graphs(folder, size_px).items():
        if "timestep" in inputs:
            inputs["timestep"] = inputs["timestep"].long()  # GenAI hands it over so
        with torch.no_grad():
            model = openvino.convert_model(module, example_input=tuple(inputs.values()))
        for port, (label, example) in zip(model.inputs, inputs.items(), strict=True):
            port.get_tensor().set_names({label})
            port.get_node().set_partial_shape(openvino.PartialShape(list(example.shape)))
        for port, label in zip(model.outputs, outputs, strict=True):
            port.get_tensor().set_names({label})
        model.validate_nodes_and_infer_types()
        (place / name).mkdir(parents=True, exist_ok=True)
        openvino.save_model(model, str(place / name / "openvino_model.xml"), compress_to_fp16=True)
    for name, source in (("text_encoder", "text_encoder"), ("unet", "unet"), ("vae_decoder", "vae")):
        shutil.copyfile(folder / "student" / source / "config.json", place / name / "config.json")
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(folder / "student" / part, place / part, dirs_exist_ok=True)
    words = CLIPTokenizer.from_pretrained(str(folder / "student" / "tokenizer"))
    openvino.save_model(
        openvino_tokenizers.convert_tokenizer(words), str(place / "tokenizer" / "openvino_tokenizer.xml")
    )
    index = (folder / "student" / "model_index.json").read_text()
    (place / "model_index.json").write_text(index)


def make_ort(folder: Path, size_px: int) -> None:
    """Plain float32 ONNX files, and the small decoder's."""
    rename = {"sample": "latent", "latent_sample": "latent", "encoder_hidden_states": "text"}
    for name, (module, inputs, outputs) in plain_graphs(folder, size_px).items():
        named = {rename.get(label, label): example for label, example in inputs.items()}
        if name == "text_encoder":
            module = _Plain(lambda m, ids: m(ids)[0], module)
        to_onnx(Graph(name, module.eval(), named, outputs[0]), folder / "ort" / f"{name}.onnx")
    torch.manual_seed(1)
    decoder = _Plain(lambda m, z: m.decode(z, return_dict=False)[0], small_autoencoder())
    side = size_px // 8
    latent = torch.randn(1, 4, side, side)
    to_onnx(Graph("small", decoder.eval(), {"latent": latent}, "sample"), folder / "ort" / "small.onnx")


def main() -> None:
    piece, folder, size_px = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    quiet()
    if piece == "student":
        make_student(folder, size_px)
    elif piece == "bundle":
        make_bundle(folder)
    elif piece == "small":
        make_small(folder, size_px)
    elif piece == "genai":
        make_genai(folder, size_px)
    else:
        make_ort(folder, size_px)


if __name__ == "__main__":
    main()
