"""A rank that runs out of memory: what the message has in it, and the snapshot."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.distributed import device
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.planning.memory import fullest_rank
from megatron_ray.training.profiling.out_of_memory import (
    RankOutOfMemoryError,
    explained_out_of_memory,
    is_out_of_memory,
)
from workers.decisions.failures import FailureKind, describe_error

CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB "
    "of which 1.02 GiB is free.\nIf reserved but unallocated memory is large try setting ..."
)
GIB = 2**30


def config_of(folder: Path) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny", "vocab_size": 256},
            "parallel": {"dp": 1},
            "data": {"train": [{"path": "x"}], "tokenizer": {"kind": "bytes"}},
            "training": {"seq_length": 16, "global_batch_size": 2, "steps": 1},
            "optimizer": {"lr": 1e-3},
            "storage": {"path": str(folder)},
        }
    )


def message_of(error: Exception, config: TrainConfig, mesh: ParallelMesh) -> str:
    explained = explained_out_of_memory(config, mesh, attempt=3)
    with pytest.raises(RankOutOfMemoryError) as caught, explained:
        raise error
    assert caught.value.__cause__ is error
    reported = {
        "type": type(caught.value).__name__,
        "message": str(caught.value),
        "failure_kind": caught.value.failure_kind,
    }
    assert describe_error(reported) == (FailureKind.OOM, str(caught.value))
    return str(caught.value)


def test_the_estimate_stands_beside_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "peak_memory_bytes", lambda _: 5 * GIB)
    monkeypatch.setattr(device, "free_memory_bytes", lambda _: GIB // 4)
    config = config_of(tmp_path)
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 43)
    mesh = ParallelMesh.single()
    message = message_of(failed.value, config, mesh)
    memory = fullest_rank(config, device.kind_of("cpu"))
    largest = next(iter(memory.terms))
    assert message.startswith(
        "out of memory (for 32,768 GiB more): this rank's peak was 5 GiB, and 0.25 GiB are "
        f"left here; the plan's estimate is {memory.total_bytes / GIB:.3g} GiB ({largest} "
    )
    assert "lower training.micro_batch_size" in message
    assert list(tmp_path.iterdir()) == []


def test_of_numpys_errors_too(tmp_path: Path) -> None:
    error = MemoryError("Unable to allocate 7.28 TiB for an array with shape (9,)")
    message = message_of(error, config_of(tmp_path), ParallelMesh.single())
    assert message.startswith("out of memory (for 7.28 TiB more): ")


@pytest.mark.parametrize("is_writable", [True, False])
def test_on_cuda_a_snapshot_of_the_allocator_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_writable: bool
) -> None:
    """The allocator's own calls stand in for a GPU."""

    class Properties:
        total_memory = 80 * GIB

    def dump(path: str) -> None:
        Path(path).write_bytes(pickle.dumps({"segments": [1]}))

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 78 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    mesh = replace(ParallelMesh.single(), device=torch.device("cuda"))
    if not is_writable:
        (tmp_path / "profiles").write_text("a file in the way")
    message = message_of(torch.OutOfMemoryError(CUDA_TEXT), config_of(tmp_path), mesh)
    assert message.startswith(
        "out of memory (for 2.00 GiB more): this rank's peak was 78 GiB of the GPU's 80 GiB; "
        "the plan's estimate is "
    )
    path = tmp_path / "profiles" / "out-of-memory-a0003" / "rank-00000.memory.pickle"
    if is_writable:
        assert f"; snapshot: {path}; lower" in message
        assert pickle.loads(path.read_bytes()) == {"segments": [1]}
    else:
        assert "; its snapshot cannot be written: " in message


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    explained = explained_out_of_memory(config_of(tmp_path), ParallelMesh.single(), 1)
    with pytest.raises(RuntimeError) as caught, explained:
        raise error
    assert caught.value is error
