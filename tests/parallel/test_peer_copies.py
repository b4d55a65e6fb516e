"""Copies of the ranks' states in memory: ranks that have lost theirs continue from those
at their partners, bit for bit, and nothing is read from storage.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ray.commands import Command
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.prepared import PreparedData
from megatron_ray.distributed.mesh import ParallelMesh, World
from megatron_ray.distributed.stores import PrefixStore
from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.reports import PeerCopiesRefusedReport, Report, StepReport
from megatron_ray.training.session import TrainingSession
from tests.support.corpus_files import prepare_squares
from workers.decisions.peers.copies import choose_copies, layout_of
from workers.decisions.peers.partners import partners
from workers.rank.environment import RankEnv
from workers.rank.messages import CopySource, StartRequest
from workers.rank.peer_attempt import attempt_copies
from workers.rank.process_copies import ProcessCopies

pytestmark = pytest.mark.parallel
Run = Callable[..., list[Any]]

STEPS = 12
STOP = 8
"""Step after which the first attempt ends, without a checkpoint."""
NODES = ["a", "a", "b", "b"]


def config(folder: Path, every_steps: int | None = 3) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "ffn_hidden_size": 64,
                "max_sequence_length": 32,
                "vocab_multiple": 64,
                "hidden_dropout": 0.1,
            },
            "parallel": {"tp": 2, "dp": 2, "sequence_parallel": True},
            "data": {
                "train": [{"path": str(folder / "corpus.txt")}],
                "tokenizer": {"kind": "bytes"},
                "cache": str(folder / "cache"),
            },
            "training": {
                "seq_length": 32,
                "micro_batch_size": 2,
                "global_batch_size": 8,
                "steps": STEPS,
            },
            "optimizer": {"lr": 0.01},
            "checkpoint": {"peer_every_steps": every_steps},
            "storage": {"path": str(folder / "storage")},
        }
    )


class Life:
    """One rank over its attempts."""

    def __init__(self, rank: int, settings: TrainConfig, data: PreparedData) -> None:
        self.rank = rank
        self.settings = settings
        self.data = data
        self.world_size = dist.get_world_size()
        self.peers = ProcessCopies("job", "127.0.0.1", Path("/nowhere"))
        dims = ParallelDims.of(settings.parallel)
        self.mesh = ParallelMesh.create(dims, World(rank, self.world_size, rank, "cpu"))
        self.reports: list[Report] = []

    def dies(self) -> None:
        """Its process is replaced."""
        self.peers.close()
        self.peers = ProcessCopies("job", "127.0.0.1", Path("/nowhere"))

    def attempt(
        self, number: int, copy: CopySource | None = None, stop: int | None = None
    ) -> dict[int, Any]:
        """Loss and norm by step; ends after `stop` steps."""
        request = StartRequest(
            env=RankEnv(self.rank, self.world_size, self.rank, self.world_size),
            spec=self.settings.model_dump(mode="json"),
            data=self.data.model_dump(mode="json"),
            attempt=number,
            device="cpu",
            partner=partners(NODES)[self.rank],
            copy=copy,
        )
        self.reports = []
        store = PrefixStore(f"a{number}", dist.distributed_c10d._get_default_store())
        report = self.reports.append
        with attempt_copies(self.peers, request, store, self.mesh, report) as copies:
            TrainingSession(
                self.settings,
                self.mesh,
                self.data,
                report=report,
                poll=lambda: self._command(stop),
                attempt=number,
                copies=copies,
            ).run()
            # The last copy is on its way, if it has not arrived.
            while stop is not None and copies is not None and copies.is_sending:
                pass
        return self.steps()

    def steps(self) -> dict[int, Any]:
        return {
            report.step: (report.loss, report.grad_norm)
            for report in self.reports
            if isinstance(report, StepReport)
        }

    def _command(self, stop: int | None) -> Command:
        if stop is not None and len(self.steps()) >= stop - 1:
            return Command.STOP
        return Command.CONTINUE

    def source(self) -> CopySource | None:
        """What a driver would choose among the copies of all ranks."""
        kept: list[Any] = [None] * self.world_size
        dist.all_gather_object(kept, self.peers.facts())
        layout = layout_of(
            self.settings.model_dump(mode="json"),
            self.data.model_dump(mode="json"),
            self.world_size,
        )
        copies = choose_copies(dict(enumerate(kept)), layout, self.world_size, 1)
        if copies is None:
            return None
        return CopySource(copies.attempt, copies.step, copies.holders[self.rank])


def loses_a_node(
    rank: int, world_size: int, settings: TrainConfig, data: PreparedData
) -> Any:
    life = Life(rank, settings, data)
    before = life.attempt(1, stop=STOP)
    if NODES[rank] == "b":
        life.dies()
    source = life.source()
    assert source is not None
    after = life.attempt(2, source, stop=4)
    # Every copy is at a partner again before the first new one is made.
    if NODES[rank] == "a":
        life.dies()
    again = life.source()
    assert again is not None
    last = life.attempt(3, again)
    return (source.step, again.step), before, after, last


def plain(rank: int, world_size: int, settings: TrainConfig, data: PreparedData) -> Any:
    return Life(rank, settings, data).attempt(1)


def loses_too_much(
    rank: int, world_size: int, settings: TrainConfig, data: PreparedData
) -> Any:
    """A copy that the driver counts on is damaged, then a rank dies with its partner."""
    life = Life(rank, settings, data)
    life.attempt(1, stop=STOP)
    source = life.source()
    assert source is not None
    if rank == 3:
        life.dies()
    if rank == 1:
        copy = life.peers.copies.find(source.attempt, source.step, 3)
        assert copy is not None
        copy.parts[0][100] ^= 1
    refused = life.attempt(
        2, CopySource(source.attempt, source.step, 1 if rank == 3 else rank)
    )
    words = [r.cause for r in life.reports if isinstance(r, PeerCopiesRefusedReport)]
    if rank in (0, 2):
        life.dies()
    return words, min(refused), life.source()


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedData:
    return prepare_squares(config(tmp_path).data)


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", {}), ("bf16", {"store_param_remainders": True, "offload": True})],
    ids=["plain", "remainders"],
)
def test_a_lost_node_costs_the_steps_since_the_copy(
    run_ranks: Run,
    tmp_path: Path,
    corpus: PreparedData,
    precision: str,
    optimizer: dict[str, bool],
) -> None:
    def of_case(every_steps: int | None) -> TrainConfig:
        fields = config(tmp_path, every_steps).model_dump()
        fields["training"]["precision"] = precision
        fields["optimizer"] |= optimizer
        return TrainConfig.from_mapping(fields)

    undisturbed = run_ranks(plain, 4, of_case(None), corpus)[0]
    lives = run_ranks(loses_a_node, 4, of_case(3), corpus)
    steps, before, after, last = lives[0]
    assert steps == (6, 9)
    for attempt, numbers in ((before, range(1, 9)), (after, range(7, 11))):
        assert attempt == {step: undisturbed[step] for step in numbers}
    assert last == {step: undisturbed[step] for step in range(10, STEPS + 1)}


def test_a_damaged_copy_is_refused_by_all_ranks(
    run_ranks: Run, tmp_path: Path, corpus: PreparedData
) -> None:
    words, first_step, source = run_ranks(loses_too_much, 4, config(tmp_path), corpus)[0]
    assert words == ["rank 3: the copy of step 6 arrived damaged"]
    assert first_step == 1, "there is no checkpoint either"
    assert source is None, "no rank has the copies of 0 and 2"
