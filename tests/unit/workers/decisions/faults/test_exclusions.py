"""Which nodes a failure speaks against."""

from typing import Any

import pytest

from workers.decisions.failures import Failure, FailureKind
from workers.decisions.faults.exclusions import bad_nodes, node_of_defects, slow_nodes
from workers.decisions.faults.gpu_errors import kernel_defects
from workers.decisions.placement import RankPlace
from workers.decisions.ranks.stragglers import SlowRank
from workers.decisions.topology.node_rules import is_usable
from workers.protocol.wire import NodeInfo


def place(rank: int, node: str) -> RankPlace:
    values: dict[str, Any] = {
        "rank": rank,
        "slot": rank,
        "bundle": 0,
        "node_id": node,
        "address": f"10.0.0.{node[-1]}",
        "gpu": rank,
        "pid": 100 + rank,
        "local_rank": 0,
        "local_world_size": 1,
        "node_rank": 0,
        "coordinates": {},
    }
    return RankPlace(**values)


PLACES = [place(0, "n1"), place(1, "n1"), place(2, "n2"), place(3, "n2")]


def test_a_defective_gpu_speaks_against_its_node() -> None:
    cause = Failure(FailureKind.GPU, "CUDA error: uncorrectable ECC error", 2)
    (bad,) = bad_nodes(cause, PLACES, ())
    assert (bad.node_id, bad.address, bad.is_listed) == ("n2", "10.0.0.2", True)
    assert bad.reason == "rank 2: CUDA error: uncorrectable ECC error"


@pytest.mark.parametrize(
    ("dead", "nodes"), [((2, 3), ["n2"]), ((2,), []), ((0, 1, 2, 3), ["n1", "n2"])]
)
def test_a_node_is_silent_when_all_of_its_ranks_are(
    dead: tuple[int, ...], nodes: list[str]
) -> None:
    bad = bad_nodes(Failure(FailureKind.SILENT, "silent", dead[0]), PLACES, dead)
    assert [node.node_id for node in bad] == nodes
    assert not any(node.is_listed for node in bad)


def test_the_next_attempt_avoids_the_node_of_a_step_that_it_computes_again() -> None:
    facts = {"step": 7, "rank": PLACES[1].rank}
    cause = Failure(FailureKind.RECHECK, "the loss of step 7 is nan", 0, facts=facts)
    (bad,) = bad_nodes(cause, PLACES, ())
    assert bad.node_id == PLACES[1].node_id
    assert bad.reason == f"rank {PLACES[1].rank} there may have computed step 7 wrongly"
    assert not bad.is_listed, "other jobs may use it until the fault is proven"


@pytest.mark.parametrize(
    "kind",
    sorted(set(FailureKind) - {FailureKind.GPU, FailureKind.SILENT, FailureKind.RECHECK}),
)
def test_no_other_failure_speaks_against_a_node(kind: FailureKind) -> None:
    assert bad_nodes(Failure(kind, "m", 0), PLACES, (0,)) == ()


def test_nodes_that_drain_or_are_excluded_are_not_usable() -> None:
    node = NodeInfo(node_id="n1", address="a")
    assert is_usable(node)
    assert not is_usable(node.model_copy(update={"excluded": "bad"}))
    assert not is_usable(node.model_copy(update={"draining": True}))


KERNEL_LOG = [
    "NVRM: Xid (PCI:0000:cb:00): 13, pid='<unknown>', name=<unknown>, Graphics SM Warp "
    "Exception on (GPC 7, TPC 7, SM 0): Illegal Instruction Parameter",
    "NVRM: Xid (PCI:0000:00:05): 43, pid=1045242, name=pt_main_thread, Ch 00000008",
    "NVRM: Xid (PCI:0000:00:07): 31, pid=2512125, name=python3.10, Ch 00000008, intr "
    "00000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_8 faulted @ 0x73ac_1c000000.",
    "NVRM: Xid (PCI:0000:dc:00): 45, pid=1818990, name=python3, Ch 00000001 caused by "
    "previous Xid 149",
    "NVRM: GPU at PCI:0000:00:05: GPU-efbdfde9-5798-a6e7-4c46-12518fa15375",
    "nvidia-peermem nv_get_p2p_free_callback:127 ERROR detected invalid context",
]
DEFECTS = [
    "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python3, GPU has fallen off the bus.",
    "NVRM: Xid (PCI:0000:86:00): 48, pid=0, Double Bit ECC Error",
    "NVRM: Xid (PCI:0000:9b:00): 95, pid=1234, name=python3, Uncontained: SM (0x1).",
    "NVRM: Xid (PCI:0000:4e:00): 119, pid=77, name=python3, Timeout waiting for RPC",
]


def test_the_kernel_tells_defects_from_faults_of_processes() -> None:
    assert kernel_defects([*KERNEL_LOG, *DEFECTS]) == DEFECTS
    bad = node_of_defects(place(5, "n3"), DEFECTS)
    assert bad.reason == f"its kernel reported: {DEFECTS[0]} and 3 more"
    assert (bad.node_id, bad.is_listed) == ("n3", True)


def test_slow_ranks_speak_against_their_node_once() -> None:
    slow = [SlowRank(2, 0.18, 0.1), SlowRank(3, 0.2, 0.1)]
    (bad,) = slow_nodes(slow, PLACES)
    assert (bad.node_id, bad.is_listed) == ("n2", True)
    assert bad.reason == "rank 3 there was 2.0 times as slow as its peers"
    assert slow_nodes([], PLACES) == ()
