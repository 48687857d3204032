"""Optimizer and weights on NVMe: a resumed run is the straight one. DeepSpeed's I/O is replaced by one that reads and writes at once, because the
real one is compiled when it is first used, against a library that is not everywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed_engines import VALUES, deepspeed_config, loaded, make_in_parts, plain_weights, save_source
from memory_stream import SETTINGS, MemoryStream, Stop, run
from tiny_models import denoiser

from dlmconvert.errors import SavedAndLeft
from dlmconvert.runs.folder import RunFolder
from dlmconvert.runs.training import swap_folder
from dlmconvert.training.checkpoint import Checkpoint, CheckpointFolder
from dlmconvert.training.deepspeed import DeepSpeedEngine, built_in_parts, checkpoint_tensors, leave_zero_3
from dlmconvert.training.loop import accumulate
from dlmconvert.training.ranks import Solo

STEPS = dataclasses.replace(SETTINGS, micro_batch=2, steps=4)
SMALLEST = 1024  # bytes that go to the disk
IN_PARTS = {"zero_optimization": {"sub_group_size": 9000, "stage3_param_persistence_threshold": 0}, "aio": {"block_size": SMALLEST}}


class AtOnce:
    """The methods of DeepSpeed's aio_handle that it uses here."""

    pinned: list[torch.Tensor] = []
    written: set[str] = set()

    def __init__(self, **settings):
        self.done = 0

    def new_cpu_locked_tensor(self, numel, like):
        self.pinned.append(torch.zeros(numel, dtype=like.dtype))
        return self.pinned[-1]

    def free_cpu_locked_tensor(self, tensor):
        return True

    def is_pinned(self, tensor):
        return any(tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in self.pinned)

    def async_pread(self, buffer, path, offset):
        content = Path(path).read_bytes()[: buffer.numel() * buffer.element_size()]
        buffer[: len(content) // buffer.element_size()].copy_(torch.frombuffer(bytearray(content), dtype=buffer.dtype))
        self.done += 1
        return 0

    def async_pwrite(self, buffer, path, offset):
        Path(path).write_bytes(buffer.detach().contiguous().view(torch.uint8).numpy().tobytes())
        self.written.add(Path(path).parent.parent.name)
        self.done += 1
        return 0

    def wait(self):
        done, self.done = self.done, 0
        return done


@pytest.fixture(autouse=True)
def disk(monkeypatch, tmp_path):
    from deepspeed.accelerator import get_accelerator

    builder = type(get_accelerator().create_op_builder("AsyncIOBuilder"))
    monkeypatch.setattr(builder, "load", lambda self, verbose=False: SimpleNamespace(aio_handle=AtOnce))
    for module in ("optimizer_utils", "partitioned_param_swapper"):
        monkeypatch.setattr(f"deepspeed.runtime.swap_tensor.{module}.MIN_AIO_BYTES", SMALLEST)
    AtOnce.pinned.clear()
    AtOnce.written.clear()
    yield tmp_path / "disk"
    leave_zero_3()


@pytest.mark.parametrize(("optimizer", "parameters"), [("nvme", "none"), ("nvme", "nvme")])
def test_killed_and_resumed_to_the_last_bit(optimizer, parameters, disk, tmp_path):
    def make():
        config = deepspeed_config(3, micro_batch=2, user=IN_PARTS, offload_optimizer=optimizer, offload_parameters=parameters, nvme=str(disk))
        with built_in_parts(config, Solo()):
            model = loaded(source)
        return DeepSpeedEngine(denoiser(model), ranks=Solo(), config=config, device=torch.device("cpu"), precision="fp32", **VALUES)

    source = save_source(tmp_path / "source", "gpt2")
    build = lambda: denoiser(loaded(source))  # noqa: E731
    _, expected = run(tmp_path / "memory", STEPS, make_in_parts(3, source, micro_batch=2))
    engine, lines = run(tmp_path / "straight", STEPS, make())
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], abs=1e-5)
    assert ("optimizer" in AtOnce.written) == (optimizer == "nvme") and any("params" in name for name in AtOnce.written) == (parameters == "nvme")
    straight = plain_weights(engine, build)
    stream = MemoryStream()
    with pytest.raises(SavedAndLeft):
        run(tmp_path / "killed", STEPS, make(), stream, Stop(stream, 2))
    engine, again = run(tmp_path / "killed", STEPS, make())
    weights = plain_weights(engine, build)
    assert again == lines and all(torch.equal(t, weights[name]) for name, t in straight.items())
    saved = checkpoint_tensors(tmp_path / "killed" / "checkpoints" / "step-000004", 3)  # what `export --checkpoint` reads
    assert all(torch.equal(saved[name], t) for name, t in weights.items())
    assert not list(disk.rglob("*.copy"))

    if parameters == "nvme":
        return
    # As if another number of processes had written it: through the universal form.
    checkpoints, engine = CheckpointFolder(tmp_path / "killed" / "checkpoints"), make()
    engine.restore(checkpoints, Checkpoint(3, {}, checkpoints.state(3) | {"processes": 2}), tmp_path)
    accumulate(engine, MemoryStream(), STEPS, 3)
    engine.update(STEPS.learning_rate_at(3))
    assert all(torch.equal(t, weights[name]) for name, t in plain_weights(engine, build).items())


def test_runs_share_a_disk_and_no_file():
    one, other = (swap_folder(RunFolder(Path(name)), "/fast") for name in ("here/run", "there/run"))
    assert one != other and one.parent == other.parent == Path("/fast")
