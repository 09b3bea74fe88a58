import pytest
import torch
from diffusers import UNet2DConditionModel

from trainer.surgery import SurgeryError, build_student, student_config, tensor_map

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 2}
POCKET = {
    "sample_size": 8,
    "block_out_channels": [32, 64, 96, 96],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
}


def on_meta(config: dict) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


@pytest.mark.parametrize(("kind", "count"), [("base", 579_384_964), ("small", 482_346_884), ("tiny", 323_384_964)])
def test_students_of_sd15_have_the_published_sizes(kind, count) -> None:
    teacher = on_meta(SD15)
    assert sum(p.numel() for p in teacher.parameters()) == 859_520_964
    student = on_meta(student_config(teacher.config, kind))
    assert sum(p.numel() for p in student.parameters()) == count
    shapes, theirs = student.state_dict(), teacher.state_dict()
    for key, origin in tensor_map(list(shapes), teacher.config, kind).items():
        assert theirs[origin].shape == shapes[key].shape, (key, origin)


@pytest.mark.parametrize("kind", ["base", "small", "tiny"])
def test_every_kept_tensor_equals_the_named_teacher_tensor_and_the_student_runs(kind) -> None:
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(POCKET)
    student = build_student(teacher, kind)
    source = teacher.state_dict()
    for key, origin in tensor_map(list(student.state_dict()), teacher.config, kind).items():
        assert torch.equal(student.state_dict()[key], source[origin])
    with torch.no_grad():
        out = student(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 32), return_dict=False)[0]
    assert out.shape == (2, 4, 8, 8) and out.isfinite().all()


def test_tiny_follows_the_published_removal_map() -> None:
    config = on_meta(SD15).config
    pairs = {
        "down_blocks.2.attentions.0.proj_out.weight": "down_blocks.2.attentions.0.proj_out.weight",
        "up_blocks.0.resnets.0.conv1.weight": "up_blocks.1.resnets.0.conv1.weight",
        "up_blocks.2.attentions.1.proj_in.bias": "up_blocks.3.attentions.2.proj_in.bias",
        "up_blocks.1.upsamplers.0.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
        "time_embedding.linear_1.weight": "time_embedding.linear_1.weight",
    }
    assert tensor_map(list(pairs), config, "tiny") == pairs


def test_a_student_does_not_share_memory_with_its_teacher() -> None:
    teacher = UNet2DConditionModel.from_config(POCKET)
    student = build_student(teacher, "tiny")
    before = teacher.conv_in.weight.clone()
    with torch.no_grad():
        student.conv_in.weight.add_(1)
    assert torch.equal(teacher.conv_in.weight, before)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layers_per_block": 1}, "layers_per_block"),
        ({"mid_block_type": None}, "mid block"),
        ({"block_out_channels": [32, 64, 96, 128]}, "block_out_channels"),
        ({"down_block_types": ["DownBlock2D"] * 4}, "down_block_types"),
    ],
)
def test_a_teacher_of_another_shape_is_refused_with_the_key(change, word) -> None:
    config = {**on_meta(POCKET).config, **change}
    with pytest.raises(SurgeryError, match=word):
        student_config(config, "tiny")
