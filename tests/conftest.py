"""Small random models in the folders that the real ones come in: for tests of plumbing, never of looks."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from factory.pocket.captioner import processor_for
from factory.pocket.clip import _new_clip, train_tokenizer
from factory.pocket.teacher import assemble
from factory.pocket.world import Concept
from factory.pocket.writer import train_tokenizer as train_writer_tokenizer

SUBJECTS = ("fox", "red apple", "rocket", "pizza", "owl", "key")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that reports, not one of its workers
        config.pluginmanager.register(_SayAtOnce(config))


class _SayAtOnce:
    """A failure is printed when it happens: a run that is cut off still says what failed."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal:
            terminal.ensure_newline()
            terminal.write_line(f"{report.nodeid} failed ({report.when}):\n{report.longreprtext}")


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Generator[pytest.LogCaptureFixture]:
    """pytest's own, listening to our logger itself: libraries take handlers off the root's, and whoever starts Ray raises the level of those that pytest gave its loggers."""
    log = logging.getLogger("edgefusion")
    level = log.level
    log.addHandler(caplog.handler)
    caplog.handler.setLevel(logging.NOTSET)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield caplog
    log.propagate = True
    log.setLevel(level)
    log.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher`, `clip`, `writer`, `captioner` and `taxonomy.yaml`: untrained, 32 px, seconds to use."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    pairs = [(Concept(f"{i:x}", name, "object"), "flat") for i, name in enumerate(SUBJECTS)]
    tokenizer = train_tokenizer(pairs, root / "clip", vocabulary=600)
    _save_clip(root / "clip", len(tokenizer))
    _save_teacher(root / "teacher", tokenizer)
    _save_writer(root / "writer", pairs)
    _save_captioner(root / "captioner", pairs)
    (root / "taxonomy.yaml").write_text(
        "groups:\n- {name: things, share: 1, must_mention: [], attributes: "
        f"{{subject: [{', '.join(SUBJECTS)}], background: [red, blue, white]}}}}\n"
    )
    return root


def _save_teacher(folder: Path, tokenizer: CLIPTokenizer) -> None:
    vae = AutoencoderKL.from_config(
        {
            "block_out_channels": [8, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "sample_size": 32,
        }
    )
    unet = UNet2DConditionModel.from_config(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8, 16, 16, 16],
            "layers_per_block": 2,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        }
    )
    end = len(tokenizer) - 1
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=24,
            eos_token_id=end,
            bos_token_id=end - 1,
            pad_token_id=end,
        )
    )
    assemble(unet, vae, encoder, tokenizer).save_pretrained(folder)


def _save_clip(folder: Path, vocabulary: int) -> None:
    config: dict = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {
            "context_length": 24,
            "vocab_size": vocabulary,
            "width": 16,
            "heads": 2,
            "layers": 1,
            "hf_tokenizer_name": "local",
        },
    }
    save_file(
        {k: v.contiguous() for k, v in _new_clip(config).state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))


def _save_writer(folder: Path, pairs: list) -> None:
    random.seed(0)
    tokenizer = train_writer_tokenizer(pairs, folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)


def _save_captioner(folder: Path, pairs: list) -> None:
    tokenizer = train_writer_tokenizer(pairs, folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=64)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor_for(tokenizer).save_pretrained(folder)
