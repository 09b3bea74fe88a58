"""The loop's promises that need no UNet: spikes, rollbacks, what is saved, and TensorBoard's points."""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import trainer.fit as fit_module
from cluster.errors import CorruptShard, StageError, TargetUnavailable
from trainer.checkpoints import newest_checkpoint, read_checkpoint
from trainer.fit import MAX_ROLLBACKS, fit
from trainer.identity import Identity
from trainer.looks import LOOKS
from trainer.recipe import PhaseRecipe
from trainer.state import METRICS, read_log
from trainer.watch import LossWatch
from trainer.workers import new_accelerator


def train(folder: Path, harm=lambda draw, loss: loss, seen: list[int] | None = None, **changes) -> nn.Linear:
    """Sixty steps of a linear model; `harm` changes the loss of a draw."""
    torch.manual_seed(0)
    settings = {"steps": 60, "batch_images": 4, "learning_rate": 1e-3, "checkpoint_s": 1e-9} | changes

    def loss_at(model: nn.Module, _average: object, draw: int, share: slice) -> torch.Tensor:
        if seen is not None:
            seen.append(draw)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(draw))[share]
        return harm(draw, (model(x) - x.sum(dim=1, keepdim=True)).pow(2).mean())

    return fit(
        "adapt",
        PhaseRecipe(**settings),
        Identity({"it is": "a recipe"}),
        nn.Linear(3, 1),
        loss_at,
        folder,
        Accelerator(),
    )


def state(folder: Path) -> dict:
    place, _ = newest_checkpoint(folder)
    assert place is not None
    return read_checkpoint(place)


HARMS = {
    "is nan": lambda draw, loss: loss * float("nan") if draw == 40 else loss,
    "is inf": lambda draw, loss: loss * float("inf") if draw == 40 else loss,
    "jumped to": lambda draw, loss: loss * 1000 if draw == 40 else loss,
    # A finite loss whose gradient is not: the root of a zero.
    "gradient of adapt at step 40 is nan": lambda draw, loss: loss + (loss * 0).sqrt() if draw == 40 else loss,
}


@pytest.mark.parametrize("what", HARMS)
def test_a_spike_stops_with_the_step_the_loss_and_the_remedy(tmp_path, what) -> None:
    with pytest.raises(StageError) as caught:
        train(tmp_path, HARMS[what])
    said = str(caught.value)
    assert what in said and "at step 40" in said and "learning_rate" in said and "rollback" in said
    saved = state(tmp_path)
    assert saved["step"] == (40 if "gradient" in what else 39), (
        "a state is saved when the next loss is known to be sound"
    )
    assert all(t.isfinite().all() for part in ("model", "average") for t in saved[part].values())


def test_each_line_of_the_log_says_at_which_step_its_start_went_on(tmp_path) -> None:
    with pytest.raises(StageError):
        train(tmp_path, HARMS["is nan"])
    assert state(tmp_path)["step"] == 39
    train(tmp_path)
    assert [row["began_step"] for row in read_log(tmp_path / METRICS)] == [0] * 39 + [39] * 21


def test_weights_that_a_step_ruined_are_not_saved(tmp_path) -> None:
    """The loss of step 30 is fine and its update is not: that shows at the next loss, before anything is kept."""
    steps = []

    def ruin(optimiser: torch.optim.Optimizer, *_: object) -> None:
        steps.append(len(steps))
        if steps[-1] == 30:
            optimiser.param_groups[0]["params"][0].data.mul_(1000)

    hook = register_optimizer_step_post_hook(ruin)
    with pytest.raises(StageError, match="step 31 jumped"):
        train(tmp_path)
    hook.remove()
    assert state(tmp_path)["step"] == 30


def test_the_last_step_is_looked_at_too(tmp_path) -> None:
    with pytest.raises(StageError, match="step 60 is nan"):
        train(tmp_path, lambda draw, loss: loss * float("nan") if draw == 60 else loss)


def test_a_rollback_goes_past_the_batches_that_led_to_the_spike_and_survives_a_kill(tmp_path, monkeypatch) -> None:
    harm, seen = HARMS["is nan"], []
    model = train(tmp_path / "whole", harm, seen, on_spike="rollback")
    assert seen == list(range(63)), "draw 40 is tried once and never again"
    rows = read_log(tmp_path / "whole" / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 61))

    saved = fit_module.save_state

    def save_and_die(*args: object) -> None:
        saved(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "save_state", save_and_die)
    for _ in range(61):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", harm, on_spike="rollback")
    monkeypatch.setattr(fit_module, "save_state", saved)
    again = train(tmp_path / "broken", harm, on_spike="rollback")
    assert torch.equal(again.weight, model.weight)
    assert [r["loss"] for r in read_log(tmp_path / "broken" / METRICS)] == [r["loss"] for r in rows]


def test_a_spike_while_the_first_state_is_still_being_written_rolls_back(tmp_path, monkeypatch) -> None:
    """What is on its way to the disk is a state: whether it has arrived must decide nothing."""
    saved, count = fit_module.save_state, []

    def slowly(*args: object) -> None:
        count.append(args)
        time.sleep(0.5)
        saved(*args)

    monkeypatch.setattr(fit_module, "save_state", slowly)
    train(tmp_path / "spiked", lambda draw, loss: loss * float("nan") if draw == 1 else loss, on_spike="rollback")
    assert [row["step"] for row in read_log(tmp_path / "spiked" / METRICS)] == list(range(1, 61))
    count.clear()
    train(tmp_path / "calm", on_spike="rollback", checkpoint_s=1e9, steps=3)
    assert len(count) == 1, "the state to go back to is saved once"


def test_losses_at_zero_and_below_are_no_spikes_of_one_another() -> None:
    """An adversarial term may be larger than the rest."""
    watch = LossWatch(10.0, [-0.05] * 30)
    assert watch.trouble(-0.04) is None and watch.trouble(0.5) is None
    assert watch.trouble(float("nan")) == "is nan"
    assert "jumped to 1 " in (LossWatch(10.0, [0.05] * 30).trouble(1.0) or "")


def test_a_rollback_without_an_end_stops(tmp_path) -> None:
    with pytest.raises(StageError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        train(tmp_path, lambda draw, loss: loss * float("nan") if draw >= 40 else loss, on_spike="rollback")


def test_noisy_losses_are_no_spike(tmp_path) -> None:
    train(tmp_path, lambda draw, loss: loss * (3.0 if draw % 5 == 0 else 1.0))
    assert len(read_log(tmp_path / METRICS)) == 60


def points(folder: Path) -> list[tuple[str, int, float]]:
    """Every scalar of every event file: length, checksum, event, checksum."""
    found = []
    for path in folder.glob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
            data = data[16 + length :]
    return sorted(found)


def test_tensorboard_gets_every_point_once_whatever_was_interrupted(tmp_path) -> None:
    def fall(draw: int, loss: torch.Tensor) -> torch.Tensor:
        if draw in (25, 45) and draw not in fell:
            fell.append(draw)
            raise KeyboardInterrupt
        return loss

    fell: list[int] = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", fall)
    train(tmp_path / "broken", fall)
    train(tmp_path / "whole")
    losses = [[p for p in points(tmp_path / name) if p[0] == "loss"] for name in ("broken", "whole")]
    assert losses[0] == losses[1]
    assert [step for _, step, _ in losses[0]] == list(range(1, 61))


def test_bytes_of_an_older_version_that_are_no_state_are_refused(tmp_path) -> None:
    (tmp_path / "state.pt").write_bytes(b"not a state at all")
    with pytest.raises(CorruptShard, match=r"state\.pt"):
        train(tmp_path)


def test_parts_of_a_batch_add_up_to_the_batch(tmp_path) -> None:
    whole = train(tmp_path / "whole")
    parts = train(tmp_path / "parts", accumulation=2)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-6)
    logs = [[row["loss"] for row in read_log(tmp_path / name / METRICS)] for name in ("whole", "parts")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    with pytest.raises(StageError, match=r"accumulation \(3\) does not divide a worker's 4 images"):
        train(tmp_path / "odd", accumulation=3)


def test_foreach_learns_what_fused_does_and_a_compiled_model_what_a_plain_one_does(tmp_path) -> None:
    whole = train(tmp_path / "whole")
    for name, change in {"foreach": {"optimiser": "adamw-foreach"}, "eager": {"compile_backend": "eager"}}.items():
        other = train(tmp_path / name, **change)
        torch.testing.assert_close(other.weight, whole.weight, rtol=1e-5, atol=1e-6)


def test_an_eight_bit_optimiser_that_cannot_run_here_is_refused_in_words(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(TargetUnavailable, match=r"pip install 'edgefusion\[eight-bit\]'"):
        train(tmp_path, optimiser="adamw-8bit")


def test_a_tracker_that_is_not_installed_is_refused_in_words(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TargetUnavailable, match="pip install wandb"):
        new_accelerator("no", ["wandb"])


class Tracker(GeneralTracker):
    """What a tracker of Accelerate is told; `kept` has (what, step, values)."""

    name = "stand-in"
    requires_logging_directory = False
    tracker = None

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[str, int | None, dict]] = []

    def log(self, values: dict, step: int | None = None, **_: object) -> None:
        self.kept.append(("row", step, dict(values)))


class PictureTracker(Tracker):
    name = "wandb"

    def log_images(self, values: dict, step: int | None = None, **_: object) -> None:
        self.kept.append(
            ("pictures", step, {name: [picture.size for picture in some] for name, some in values.items()})
        )


class FileTracker(Tracker):
    name = "mlflow"

    def log_artifact(self, local_path: str, artifact_path: str) -> None:
        self.kept.append(("file", None, {artifact_path: Path(local_path).name}))


class Looks:
    keeps_best = False

    def is_due(self, step: int, steps: int) -> bool:
        return step == 2

    def draw(self, average: object, step: int, folder: Path) -> float:
        (folder / LOOKS).mkdir()
        place = folder / LOOKS / f"step-{step:07d}"
        Image.new("RGB", (6, 3)).save(place.with_suffix(".png"))
        place.with_suffix(".json").write_text('{"step": 2, "scores": {"4": 0.5, "1": 0.25}}')
        return 0.375


def test_trackers_are_told_what_tensorboard_is(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit_module, "machine_use", lambda: {"memory_gib": 1.5, "gpu_percent": 50.0})
    trackers = [Tracker(), PictureTracker(), FileTracker()]
    accelerator = Accelerator(cpu=True, log_with=trackers)
    accelerator.init_trackers("edgefusion")
    settings = PhaseRecipe(steps=3, batch_images=4, learning_rate=1e-3)
    fit(
        "distill",
        settings,
        Identity({}),
        nn.Linear(3, 1),
        lambda m, _a, _d, _s: m(torch.ones(4, 3)).pow(2).mean(),
        tmp_path,
        accelerator,
        validation=Looks(),
    )
    drawn: dict[int, dict[str, float]] = {step: {} for step in (1, 2, 3)}
    for tag, step, value in points(tmp_path):
        if tag != "looks":
            drawn[step][f"distill/{tag}"] = value
    assert {"distill/grad_norm", "distill/memory_gib", "distill/gpu_percent", "distill/learning_rate"} < set(drawn[1])
    for tracker in trackers:
        told: dict[int, dict[str, float]] = {step: {} for step in (1, 2, 3)}
        for what, at, values in tracker.kept:
            if what == "row":
                step = values.pop("distill/step")
                assert at == (None if tracker.name == "wandb" else step)
                told[step] |= values
        assert {step: set(row) for step, row in told.items()} == {step: set(row) for step, row in drawn.items()}
        assert all(row == pytest.approx(drawn[step], rel=1e-5) for step, row in told.items())
    seen = [[(what, values) for what, _, values in tracker.kept if what != "row"] for tracker in trackers]
    assert seen == [
        [],
        [("pictures", {"distill/looks": [(6, 3)]})],
        [("file", {"distill/looks": "step-0000002.png"})],
    ]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_trackers_write_files_below_the_training(tmp_path, monkeypatch, name) -> None:
    pytest.importorskip(name)
    from trainer.track import end_trackers, start_trackers

    for key in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    accelerator = new_accelerator("no", [name])
    start_trackers(accelerator, [name], tmp_path / "run" / "training", {"size_px": 32, "adapt": {"steps": 2}})
    settings = PhaseRecipe(steps=2, batch_images=4, learning_rate=1e-3)
    model = nn.Linear(3, 1)
    fit(
        "adapt",
        settings,
        Identity({}),
        model,
        lambda m, _a, _d, _s: m(torch.ones(4, 3)).pow(2).mean(),
        tmp_path,
        accelerator,
    )
    end_trackers(accelerator)
    written = [p for p in (tmp_path / "run" / "training").rglob("*") if p.is_file()]
    place = {"mlflow": "loss", "wandb": ".wandb"}[name]
    assert any(place in p.name for p in written), written
