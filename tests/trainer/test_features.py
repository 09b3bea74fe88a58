import pytest
import torch
from diffusers import UNet2DConditionModel

from trainer.features import Features, feature_names
from trainer.losses import feature_loss
from trainer.surgery import build_student

INPUTS = (torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.randn(2, 7, 16))


def teacher() -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "block_out_channels": [8, 16, 16, 16],
        "layers_per_block": 2,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel.from_config(config)


def test_tiny_has_the_six_published_pairs() -> None:
    student, large = feature_names(4, 2, "tiny")
    assert large == [
        "down_blocks.0",
        "down_blocks.1",
        "down_blocks.2.attentions.1.proj_out",
        "up_blocks.1",
        "up_blocks.2",
        "up_blocks.3",
    ]
    assert student[2] == "down_blocks.2.attentions.0.proj_out" and student[3:] == [f"up_blocks.{i}" for i in range(3)]


@pytest.mark.parametrize("kind", ["base", "small", "tiny"])
def test_pairs_have_equal_shapes_and_every_block_gets_a_gradient(kind) -> None:
    large = teacher()
    small = build_student(large, kind)
    names = feature_names(4, 2, kind)
    own, theirs = Features(small, names[0]), Features(large, names[1])
    small(*INPUTS)
    with torch.no_grad():
        large(*INPUTS)
    mine, wanted = own.take(need_grad=True), theirs.take()
    assert [m.shape for m in mine] == [w.shape for w in wanted]
    feature_loss(mine, wanted).backward()
    for block in [*small.down_blocks, *small.up_blocks]:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_features_keep_their_gradient_under_checkpointing() -> None:
    small = build_student(teacher(), "tiny").train()
    small.enable_gradient_checkpointing()
    caught = Features(small, feature_names(4, 2, "tiny")[0])
    small(*INPUTS)
    assert all(f.requires_grad for f in caught.take(need_grad=True))


def test_a_detached_feature_is_refused() -> None:
    small = build_student(teacher(), "tiny")
    caught = Features(small, feature_names(4, 2, "tiny")[0])
    with torch.no_grad():
        small(*INPUTS)
    with pytest.raises(RuntimeError, match="no gradient"):
        caught.take(need_grad=True)
    with pytest.raises(RuntimeError, match="was the UNet called"):
        caught.take()
