"""The options of a mesh's groups; the groups themselves are in tests/parallel."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ray.distributed import mesh
from megatron_ray.distributed.mesh import NcclOptions

TIMEOUT = timedelta(seconds=9)


class FakeNccl:
    """ProcessGroupNCCL, which builds without CUDA lack."""

    class Options:
        def __init__(self, *, is_high_priority_stream: bool) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self.config = type("NCCLConfig", (), {})()
            self._timeout: timedelta | None = None


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of the groups that were made, by name."""
    options: dict[str, Any] = {}

    def new_group(ranks: list[int], **fields: Any) -> object:
        options[fields["group_desc"]] = fields["pg_options"]
        return object()

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", FakeNccl, raising=False)
    return options


def test_each_axis_has_its_own_options(made: dict[str, Any]) -> None:
    nccl = {
        "tp": NcclOptions(min_ctas=8, max_ctas=16),
        "dp": NcclOptions(high_priority_stream=True),
    }
    factory = mesh._GroupFactory(TIMEOUT, nccl, torch.device("cuda"))
    for index, name in enumerate(("tp", "replica", "edp", "pp")):
        factory.get((index, index + 1), name)
    assert vars(made["tp"].config) == {"min_ctas": 8, "max_ctas": 16}
    assert (made["tp"].is_high_priority_stream, made["tp"]._timeout) == (False, TIMEOUT)
    assert made["replica"].is_high_priority_stream
    # torch writes a group's ranks into its options.
    assert made["replica"] is not made["edp"]
    assert made["pp"] is None, "what is not chosen is left to torch"


def test_gloo_has_no_options(made: dict[str, Any]) -> None:
    nccl = {"tp": NcclOptions(max_ctas=4)}
    mesh._GroupFactory(TIMEOUT, nccl, torch.device("cpu")).get((0, 1), "tp")
    assert made == {"tp": None}
