"""Compares the weights of all replicas, which must be equal to the bit.

Owns: the digest of a parameter and the verdict about differences. Must not know: the
model, optimizers, reports.

Replicas get the same weights from the same reductions. Where one differs, a bit of its
memory has changed, or it has computed something wrongly.
"""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megatron_ray.data_parallel.buffers import FlatBuffers, ParameterGroup
from megatron_ray.distributed import collectives
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.exceptions import ErrorKind, MegatronRayError
from megatron_ray.training.progress import Progress, is_due

_ROW = 1024
"""Elements of a row; a digest weighs the columns differently."""
_INTEGERS = {2: torch.int16, 4: torch.int32}
"""Integers with the bits of floating-point numbers, by bytes."""


class ReplicaError(MegatronRayError):
    """Replicas have different weights; every rank with the same parameters raises it."""

    failure_kind: ClassVar[ErrorKind] = ErrorKind.REPLICAS


class FaultyReplicaError(ReplicaError):
    """This rank's weights differ from those of most replicas."""

    failure_kind: ClassVar[ErrorKind] = ErrorKind.HARDWARE


class ReplicaCheck:
    """Compares the weights of this rank with its replicas every `every_steps` steps."""

    def __init__(
        self,
        every_steps: int | None,
        mesh: ParallelMesh,
        groups: Sequence[ParameterGroup],
    ) -> None:
        self._every_steps = every_steps
        self._mesh = mesh
        self._groups = groups

    def run(self, progress: Progress) -> None:
        """Compares the weights if that is due; the host waits for the device then.

        Raises ReplicaError.
        """
        if not is_due(self._every_steps, progress):
            return
        for group in self._groups:
            if group.group is None:
                continue
            if group.gathers is not None:
                group.gathers.wait_for_all()
            self._compare(group, progress.step)

    def _compare(self, group: ParameterGroup, step: int) -> None:
        names = []
        rows = [torch.tensor([self._mesh.rank, 0], device=self._mesh.device)]
        for name, flat in _parameters(group.buffers):
            names.append(name)
            rows.append(digest(flat))
        replicas = collectives.all_gather_rows(torch.stack(rows)[None], group.group)
        ranks = replicas[:, 0, 0].tolist()
        # Most checks end here, with one bit to read.
        if bool((replicas[:, 1:] == replicas[0, 1:]).all()):
            return
        verdict = find_difference(names, ranks, replicas[:, 1:].tolist())
        message = f"after step {step} {verdict[1]}; the run goes on from a checkpoint"
        if verdict[0] == self._mesh.rank:
            raise FaultyReplicaError(message)
        raise ReplicaError(message)


def _parameters(buffers: FlatBuffers) -> list[tuple[str, Tensor]]:
    parameters = []
    for placed in buffers.plan.placed:
        flat = buffers.parameters[placed.start : placed.end]
        parameters.append((placed.parameter.name, flat))
    return parameters


@torch.no_grad()
def digest(flat: Tensor) -> Tensor:
    """Returns two integers that change with any bit of a flat tensor."""
    bits = flat.view(_INTEGERS[flat.element_size()])
    body = bits[: bits.numel() // _ROW * _ROW].view(-1, _ROW)
    columns = body.sum(0, dtype=torch.int64)
    rest = bits[body.numel() :]
    columns[: rest.numel()] += rest
    weights = torch.arange(1, _ROW + 1, device=flat.device)
    return torch.stack([columns.sum(), (columns * weights).sum()])


def find_difference(
    names: Sequence[str],
    ranks: Sequence[int],
    digests: Sequence[Sequence[Sequence[int]]],
) -> tuple[int | None, str]:
    """Returns the rank whose weights are wrong, if one is known, and a sentence.

    `digests` are by rank and parameter; some differ. With two replicas no rank is known
    to be wrong.
    """
    for index, name in enumerate(names):
        values = [tuple(of_rank[index]) for of_rank in digests]
        (common, count), *others = Counter(values).most_common()
        if not others:
            continue
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
        if count * 2 <= len(ranks):
            listed = ", ".join(map(str, sorted(ranks)))
            return None, (
                f"the replicas on ranks {listed} have different weights in {name}, and which "
                "of them is right is not known"
            )
        return odd[0], (
            f"rank {odd[0]} has other weights in {name} than {count} of its "
            f"{len(ranks)} replicas"
        )
    raise ValueError("all digests are equal")
