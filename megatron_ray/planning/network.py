"""Estimates how long collectives take on the links and the network of a device.

Pure. Must not know: which layer sends what.
"""

from collections.abc import Iterable

from megatron_ray.parallel_dims import ParallelDims
from megatron_ray.planning.hardware import Hardware
from megatron_ray.planning.tally import Axis, Kind, Tally


class Network:
    """Seconds of collectives at full bandwidth, for the groups of rank 0."""

    def __init__(self, world: ParallelDims, hardware: Hardware) -> None:
        self.hardware = hardware
        dims = world.of_group
        groups: dict[Axis, tuple[int, ...]] = {
            "tp": dims.group_of(0, ("tp",)),
            "cp": dims.group_of(0, ("cp",)),
            "pp": dims.group_of(0, ("pp",)),
            "dp": dims.group_of(0, ("dp", "cp")),
            "shard": dims.shard_levels_of(0)[0],
            "ep": dims.experts.group_of(0, ("ep",)),
            "etp": dims.experts.group_of(0, ("etp",)),
            "edp": dims.experts.group_of(0, ("edp",)),
            "embedding": dims.embedding_group_of(0),
            "tokens": dims.group_of(0, ("tp", "cp")),
            # Its few bytes do not matter, so two ranks represent all.
            "world": (0, dims.world_size - 1),
        }
        self._sizes = dict[Axis, int]()
        self._bandwidths = dict[Axis, float]()
        for axis, members in groups.items():
            self._sizes[axis] = len(members)
            ranks = tuple(world.rank_of(0, member) for member in members)
            self._bandwidths[axis] = self._bandwidth(ranks)
        self._sizes["sync"] = world.replica_groups
        self._bandwidths["sync"] = self._bandwidth(world.sync_group_of(0))

    def _bandwidth(self, members: tuple[int, ...]) -> float:
        # Ranks are placed node by node, so the first ones share a node with rank 0.
        in_first_node = sum(member < self.hardware.node_size for member in members)
        if in_first_node == len(members):
            return self.hardware.link_bandwidth
        return self.hardware.link(in_first_node)

    def seconds(self, axis: Axis, kind: Kind, size: float) -> float:
        """Returns the seconds of a collective of `size` bytes.

        Ring algorithms are assumed, in which each of n ranks sends n - 1 parts, or twice
        as many for an all-reduce (nccl-tests, doc/PERFORMANCE.md).
        """
        n = self._sizes[axis]
        sent_share = {
            "all_reduce": 2 * (n - 1) / n,
            "reduce_scatter": (n - 1) / n,
            "all_to_all": (n - 1) / n,
            "all_gather": n - 1,
            "send": 1,
        }
        return sent_share[kind] * size / self._bandwidths[axis]

    def total(self, tally: Tally, keys: Iterable[tuple[Axis, Kind]]) -> float:
        """Returns the seconds of these entries of a tally."""
        seconds = 0.0
        for axis, kind in keys:
            seconds += self.seconds(axis, kind, tally.bytes[axis, kind])
        return seconds
