"""Decides which nodes are bad, from what all ranks have measured.

Owns: the comparison with peers, who is to blame for a slow link, when a judgement is void.
Pure. Must not know: Ray, torch, how anything was measured, what follows.

Devices are compared with the median of all devices of the same name, nodes with that of
nodes with as many of them, links with the median of the nodes' best links. A node is bad
below a share of that, so no table of devices is needed. Where a device's figures are
published, a small share of them is a limit too: all that can be checked on a single node.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high

from megatron_ray.planning.hardware import hardware_named
from workers.decisions.placement import RankPlace
from workers.decisions.preflight.figures import flops_text, rate_text
from workers.decisions.preflight.hangs import find_blocked
from workers.decisions.preflight.measured_nodes import MeasuredNodes
from workers.decisions.preflight.speeds import RankSpeeds
from workers.decisions.preflight.verdict import (
    BlamedNode,
    LinkSpeed,
    NodeSpeed,
    Verdict,
)

PUBLISHED_SHARE = 0.3
"""Share of a device's published figures below which it is bad, whatever its peers do."""
_PART_OF_GPU = "MIG"
"""In the name of a device whose figures are not published."""
Reasons = dict[str, list[str]]
"""Why nodes are bad, by node id."""
Pair = tuple[str, str]
"""Ids of two nodes."""


@dataclass(frozen=True)
class Limits:
    """What counts as bad."""

    min_ratio: float
    """Share of the median of the peers."""
    timeout_s: float
    precision: str
    """Precision of the products, as in `training.precision`."""


def judge(
    places: Sequence[RankPlace], speeds: Mapping[int, RankSpeeds], limits: Limits
) -> Verdict:
    """Returns the verdict on the nodes of an attempt's ranks.

    `speeds` are the measurements by rank; parts that are missing have hung.
    """
    nodes = MeasuredNodes(places)
    known = {}
    for place in places:
        known[place.rank] = speeds.get(place.rank, RankSpeeds(place.rank))
    reasons: Reasons = {}
    _compare_devices(nodes, known, limits, reasons)
    rows = _node_speeds(nodes, known)
    _compare_nodes(rows, limits, reasons)
    links, warnings = _compare_links(nodes, known, limits, reasons)
    blocked = find_blocked(nodes, known, limits.timeout_s)
    sentence = None
    if blocked is not None:
        sentence = blocked.sentence
        for node_id, reason in blocked.reasons.items():
            reasons.setdefault(node_id, []).append(reason)
    bad = _bad_nodes(nodes, reasons)
    # If most nodes are bad, the comparison is.
    if 2 * len(bad) > len(nodes):
        warnings += map(BlamedNode.sentence, bad)
        if len(nodes) > 1:
            warnings.append(
                f"no node is left out, because {len(bad)} of {len(nodes)} would be"
            )
        bad = ()
    return Verdict(
        nodes=rows,
        links=links,
        all_reduce_bytes_per_s=_slowest("world", known.values()),
        bad=bad,
        warnings=tuple(warnings),
        blocked=sentence,
    )


def _node_speeds(
    nodes: MeasuredNodes, speeds: Mapping[int, RankSpeeds]
) -> tuple[NodeSpeed, ...]:
    rows = []
    for node_id, ranks in nodes.ranks_of.items():
        own = list(map(speeds.__getitem__, ranks))
        rows.append(
            NodeSpeed(
                node_id=node_id,
                address=nodes.address(node_id),
                num_ranks=len(ranks),
                device=own[0].device,
                flops=_slowest("flops", own),
                memory_bytes_per_s=_slowest("memory", own),
                all_reduce_bytes_per_s=_slowest("node", own),
            )
        )
    return tuple(rows)


# ---- devices


def _compare_devices(
    nodes: MeasuredNodes,
    speeds: Mapping[int, RankSpeeds],
    limits: Limits,
    reasons: Reasons,
) -> None:
    by_device: dict[str, list[RankSpeeds]] = {}
    for rank in speeds.values():
        if rank.device:
            by_device.setdefault(rank.device, []).append(rank)
    for name, peers in by_device.items():
        peak_flops, peak_memory = _published(name, limits.precision)
        flops = _Comparison("matmul", _known("flops", peers), peak_flops)
        memory = _Comparison("memory", _known("memory", peers), peak_memory)
        for rank in peers:
            complaints = [
                rank.problem,
                flops.complaint(rank.flops, limits.min_ratio, flops_text),
                memory.complaint(rank.memory, limits.min_ratio, rate_text),
            ]
            for text in filter(None, complaints):
                reason = f"{nodes.device_label(rank.rank)}{text}"
                reasons.setdefault(nodes.of(rank.rank), []).append(reason)


class _Comparison:
    """One figure of equal devices, and the published one."""

    def __init__(self, name: str, values: Sequence[float], published: float | None) -> None:
        self._name = name
        self._published = published
        self._median = median_high(values or [0.0])

    def complaint(
        self, value: float | None, min_ratio: float, text: Callable[[float], str]
    ) -> str | None:
        """Returns why a device of this value is bad; None: it is not."""
        if value is None:
            return None
        if value < min_ratio * self._median:
            return f"{self._name} {text(value)}, median of its peers {text(self._median)}"
        if self._published is not None and value < PUBLISHED_SHARE * self._published:
            return f"{self._name} {text(value)}, published {text(self._published)}"
        return None


def _published(name: str, precision: str) -> tuple[float | None, float | None]:
    """Returns the published FLOP/s and bytes/s of a GPU; None where they are not known."""
    if _PART_OF_GPU in name.split():
        return None, None
    hardware = hardware_named(name.replace(" ", "-"))
    # That of CPUs is a core of one of them.
    if hardware is None or hardware.device.type != "cuda":
        return None, None
    return hardware.peaks.get(precision), hardware.memory_bandwidth


# ---- nodes and links


def _compare_nodes(rows: Sequence[NodeSpeed], limits: Limits, reasons: Reasons) -> None:
    """Compares the all-reduces in nodes with equal devices."""
    peers: dict[tuple[str, int], list[float]] = {}
    for node in rows:
        if node.all_reduce_bytes_per_s is not None:
            rates = peers.setdefault((node.device, node.num_ranks), [])
            rates.append(node.all_reduce_bytes_per_s)
    for node in rows:
        rate = node.all_reduce_bytes_per_s
        if rate is None:
            continue
        median = median_high(peers[node.device, node.num_ranks])
        if rate < limits.min_ratio * median:
            reason = (
                f"all-reduce in the node {rate_text(rate)}, median of its peers "
                f"{rate_text(median)}"
            )
            reasons.setdefault(node.node_id, []).append(reason)


def _compare_links(
    nodes: MeasuredNodes,
    speeds: Mapping[int, RankSpeeds],
    limits: Limits,
    reasons: Reasons,
) -> tuple[tuple[LinkSpeed, ...], list[str]]:
    """Returns the links, and sentences about slow ones that no node explains."""
    rates = _link_rates(nodes, speeds)
    of_node = _pairs_by_node(rates)
    # The links of a slow node are slow too, so the median of all may be one of them.
    best = [max(map(rates.__getitem__, pairs)) for pairs in of_node.values()]
    median = median_high(best or [0.0])
    slow = {pair: rate for pair, rate in rates.items() if rate < limits.min_ratio * median}
    _blame_for_links(of_node, slow, median, reasons)
    links = []
    warnings = []
    for pair, rate in rates.items():
        labels = (nodes.label(pair[0]), nodes.label(pair[1]))
        links.append(LinkSpeed(pair, labels, rate, pair in slow))
        if pair in slow and not reasons.keys() & set(pair):
            warnings.append(
                f"the link {nodes.link_label(pair)} is slow: {rate_text(rate)}, median "
                f"{rate_text(median)}"
            )
    return tuple(links), warnings


def _link_rates(
    nodes: MeasuredNodes, speeds: Mapping[int, RankSpeeds]
) -> dict[Pair, float]:
    """Returns the lowest rate that any two ranks have measured between two nodes."""
    rates: dict[Pair, float] = {}
    for rank, own in speeds.items():
        for peer, rate in own.links.items():
            pair = nodes.pair(rank, peer)
            rates[pair] = min(rate, rates.get(pair, rate))
    return rates


def _pairs_by_node(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    of_node: dict[str, list[Pair]] = {}
    for pair in pairs:
        for node_id in pair:
            of_node.setdefault(node_id, []).append(pair)
    return of_node


def _blame_for_links(
    of_node: Mapping[str, Sequence[Pair]],
    slow: Mapping[Pair, float],
    median: float,
    reasons: Reasons,
) -> None:
    """Adds a reason for each node most of whose links are slow."""
    for node_id, pairs in of_node.items():
        own_slow = [slow[pair] for pair in pairs if pair in slow]
        # One of two slow links may be that of another bad node.
        if len(pairs) > 1 and 2 * len(own_slow) > len(pairs):
            reason = (
                f"{len(own_slow)} of its {len(pairs)} links {rate_text(max(own_slow))} or "
                f"less, median of its peers {rate_text(median)}"
            )
            reasons.setdefault(node_id, []).append(reason)


# ---- the verdict


def _bad_nodes(nodes: MeasuredNodes, reasons: Reasons) -> tuple[BlamedNode, ...]:
    bad = []
    for node_id, own in reasons.items():
        reason = "; ".join(dict.fromkeys(own))
        bad.append(BlamedNode(node_id, nodes.label(node_id), reason))
    return tuple(bad)


def _slowest(figure: str, ranks: Iterable[RankSpeeds]) -> float | None:
    return min(_known(figure, ranks), default=None)


def _known(figure: str, ranks: Iterable[RankSpeeds]) -> list[float]:
    """Returns a figure of those ranks that have measured it."""
    known = []
    for rank in ranks:
        value = getattr(rank, figure)
        if value is not None:
            known.append(value)
    return known
