"""Maps the ranks of an attempt to their nodes, with the names that sentences use.

Owns: these names. Pure. Must not know: Ray, torch, what is measured.
"""

from collections.abc import Sequence

from workers.decisions.placement import RankPlace


class MeasuredNodes:
    """The nodes of an attempt's ranks."""

    def __init__(self, places: Sequence[RankPlace]) -> None:
        self._places = {place.rank: place for place in places}
        self.ranks_of: dict[str, list[int]] = {}
        """Ranks by node id, in ascending order."""
        self._addresses: dict[str, str] = {}
        for rank in sorted(self._places):
            place = self._places[rank]
            self.ranks_of.setdefault(place.node_id, []).append(rank)
            self._addresses[place.node_id] = place.address

    def __len__(self) -> int:
        """Returns the number of nodes."""
        return len(self.ranks_of)

    @property
    def by_rank(self) -> list[str]:
        """The node id of each rank."""
        return list(map(self.of, sorted(self._places)))

    def of(self, rank: int) -> str:
        """Returns the node id of a rank."""
        return self._places[rank].node_id

    def pair(self, rank: int, peer: int) -> tuple[str, str]:
        """Returns the ids of two ranks' nodes, in the same order whichever comes first."""
        first = self.of(rank)
        second = self.of(peer)
        return min(first, second), max(first, second)

    def address(self, node_id: str) -> str:
        """Returns the address of a node."""
        return self._addresses[node_id]

    def label(self, node_id: str) -> str:
        """Returns a node's address, with its id where others have the same address."""
        address = self._addresses[node_id]
        if list(self._addresses.values()).count(address) > 1:
            return f"{address} ({node_id[:12]})"
        return address

    def link_label(self, nodes: tuple[str, str]) -> str:
        """Returns the name of a link between two nodes."""
        return f"{self.label(nodes[0])} - {self.label(nodes[1])}"

    def device_label(self, rank: int) -> str:
        """Returns the beginning of a sentence about a rank's device.

        Empty for the only rank of a node on CPU.
        """
        place = self._places[rank]
        if place.gpu is not None:
            return f"GPU {place.gpu}: "
        if len(self.ranks_of[place.node_id]) > 1:
            return f"rank {rank}: "
        return ""
