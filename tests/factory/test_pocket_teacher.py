import torch

from factory.pocket.teacher import new_unet, schedule


def test_teacher_is_sd_v1_shaped_and_reads_its_text() -> None:
    torch.manual_seed(0)
    unet = new_unet()
    assert [type(b).__name__ for b in unet.down_blocks] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    latents, times = torch.randn(2, 16, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        one = unet(latents, times, torch.randn(2, 24, 128), return_dict=False)[0]
        other = unet(latents, times, torch.randn(2, 24, 128), return_dict=False)[0]
    assert one.shape == latents.shape
    assert not torch.allclose(one, other)
    assert 6e6 < sum(p.numel() for p in unet.parameters()) < 25e6


def test_schedule_is_stable_diffusions_with_velocity() -> None:
    noiser = schedule()
    assert noiser.config["prediction_type"] == "v_prediction"
    torch.testing.assert_close(noiser.alphas_cumprod[-1], torch.tensor(0.0047), atol=1e-4, rtol=0)
