import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from cluster.errors import CorruptShard, EdgeFusionError
from factory.pack import Sample, pack
from trainer.stream import ShardStream


def picture(shade: int, width: int = 40, height: int = 32) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def data(tmp_path):
    samples = [
        Sample(hashlib.sha256(bytes([i])).hexdigest(), picture(i), "png", f"prompt {i}", {"i": i}) for i in range(23)
    ]
    pack(samples, tmp_path, samples_per_shard=7)
    return tmp_path


def batch_rows(stream: ShardStream, step: int, batch: int) -> list[int]:
    """Row numbers of the global batch at `step`."""
    return [stream.row_at(draw) for draw in range(step * batch, (step + 1) * batch)]


def test_every_epoch_shows_every_sample_once_in_another_order(data) -> None:
    stream = ShardStream(data, seed=3)
    rows = [row for step in range(23) for row in batch_rows(stream, step, 2)]
    first, second = rows[:23], rows[23:]
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second


def test_a_batch_is_a_function_of_seed_and_step_alone(data) -> None:
    forward, other = ShardStream(data, seed=3), ShardStream(data, seed=3)
    wanted = [batch_rows(forward, step, 5) for step in range(12)]
    assert [batch_rows(other, step, 5) for step in reversed(range(12))] == wanted[::-1]
    assert [batch_rows(ShardStream(data, seed=4), step, 5) for step in range(12)] != wanted


def test_samples_are_read_where_they_lie(data) -> None:
    stream = ShardStream(data)
    for row in (22, 0, 9):
        example = stream.read(row)
        shade = example.facts["i"]
        assert example.prompt == f"prompt {shade}"
        assert example.picture == picture(shade)
        assert example.pixels(16).shape == (16, 16, 3) and int(example.pixels(16).mean()) == shade
    stream.close()


def test_a_damaged_shard_is_refused_before_training(data) -> None:
    shard = data / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptShard, match="shard-000001"):
        ShardStream(data)


def test_before_the_cut_of_a_shard_a_worker_that_proves_nothing_reads_too(data) -> None:
    """Only the main process looks for damage; the others are told which samples to leave out."""
    rows = ShardStream(data).rows
    shard = data / rows[0]["shard"]
    shard.write_bytes(shard.read_bytes()[:5000])
    assert ShardStream(data, check=False, on_corrupt="skip").read(0).id == rows[0]["id"]
    with pytest.raises(CorruptShard):
        ShardStream(data, check=False).read(0)


def test_an_empty_data_set_is_refused(tmp_path) -> None:
    pack([], tmp_path)
    with pytest.raises(EdgeFusionError, match="empty"):
        ShardStream(tmp_path)
