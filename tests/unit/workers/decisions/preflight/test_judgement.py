"""Which nodes are bad, and what is known of one that does not measure to the end."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.decisions.placement import RankPlace
from workers.decisions.preflight.judgement import Limits, judge
from workers.decisions.preflight.orders import preflight_orders
from workers.decisions.preflight.speeds import RankSpeeds
from workers.decisions.preflight.verdict import Verdict

LIMITS = Limits(min_ratio=0.8, timeout_s=60.0, precision="bf16")
GPU = "NVIDIA H100 80GB HBM3"


class Measured:
    """Ranks on nodes that are all equally fast, until a test makes one slow."""

    def __init__(self, num_nodes: int, ranks_per_node: int = 2, device: str = GPU) -> None:
        self.places = []
        for rank in range(num_nodes * ranks_per_node):
            node, local_rank = divmod(rank, ranks_per_node)
            self.places.append(
                RankPlace(
                    rank=rank,
                    slot=rank,
                    bundle=rank,
                    node_id=f"node-{node}",
                    address=f"192.0.2.{node}",
                    gpu=local_rank,
                    pid=rank,
                    local_rank=local_rank,
                    local_world_size=ranks_per_node,
                    node_rank=node,
                    coordinates={},
                )
            )
        orders = preflight_orders([place.node_id for place in self.places], 60.0)
        self.speeds = {}
        for rank, order in enumerate(orders):
            kinds = {kind for kind, _ in order.parts}
            self.speeds[rank] = RankSpeeds(
                rank,
                device=device,
                flops=6e14,
                memory=2.8e12,
                node=4e11 if "node" in kinds else None,
                links=dict.fromkeys(order.peers, 4.5e10),
                world=4e10 if "world" in kinds else None,
            )

    def slow_links(self, *nodes: str) -> None:
        """Makes the links among these nodes, or all of one, slow."""
        for rank, speeds in self.speeds.items():
            links = dict(speeds.links)
            for peer in links:
                ends = {self.places[rank].node_id, self.places[peer].node_id}
                if ends <= set(nodes) or (len(nodes) == 1 and ends & set(nodes)):
                    links[peer] = 3e9
            self.speeds[rank] = replace(speeds, links=links)

    def stop(self, ranks: Iterable[int], part: str, peer: int | None = None) -> None:
        """Has ranks not do a part, nor any after it."""
        for rank in ranks:
            speeds = self.speeds[rank]
            links = dict(speeds.links)
            if part == "device":
                speeds = RankSpeeds(rank)
            elif part == "node":
                speeds = replace(speeds, node=None, links={}, world=None)
            elif part == "link":
                order = list(links)
                kept = order[: order.index(peer)] if peer is not None else []
                speeds = replace(speeds, links={p: links[p] for p in kept}, world=None)
            else:
                speeds = replace(speeds, world=None)
            self.speeds[rank] = speeds

    def verdict(self) -> Verdict:
        return judge(self.places, self.speeds, LIMITS)


def bad(verdict: Verdict) -> dict[str, str]:
    return {node.node_id: node.reason for node in verdict.bad}


@given(num_nodes=st.integers(1, 12), ranks=st.integers(1, 4), seed=st.randoms())
def test_noise_within_the_limit_is_not_bad(
    num_nodes: int, ranks: int, seed: object
) -> None:
    job = Measured(num_nodes, ranks)
    for rank, speeds in job.speeds.items():
        factor = seed.uniform(0.95, 1.05)  # type: ignore[attr-defined]
        assert speeds.flops is not None
        job.speeds[rank] = replace(speeds, flops=speeds.flops * factor)
    verdict = job.verdict()
    assert verdict.has_passed
    assert verdict.warnings == ()
    assert len(verdict.nodes) == num_nodes


@given(num_nodes=st.integers(2, 12), data=st.data())
def test_one_slow_device_makes_its_node_bad_and_no_other(
    num_nodes: int, data: st.DataObject
) -> None:
    job = Measured(num_nodes)
    rank = data.draw(st.integers(0, len(job.places) - 1))
    job.speeds[rank] = replace(job.speeds[rank], flops=2.12e14)
    verdict = job.verdict()
    gpu = job.places[rank].gpu
    assert bad(verdict) == {
        job.places[rank].node_id: (
            f"GPU {gpu}: matmul 212 TFLOP/s, median of its peers 600 TFLOP/s"
        )
    }
    assert verdict.sentence() == (
        f"pre-flight: node {job.places[rank].address}: GPU {gpu}: matmul 212 TFLOP/s, median of "
        "its peers 600 TFLOP/s"
    )


def test_devices_of_other_names_are_no_peers() -> None:
    job = Measured(2, 1)
    job.speeds[0] = replace(
        job.speeds[0], device="NVIDIA A100-SXM4-80GB", flops=2e14, memory=1.6e12
    )
    assert job.verdict().has_passed


def test_a_wrong_product_is_bad_however_fast() -> None:
    job = Measured(3)
    job.speeds[5] = replace(
        job.speeds[5], problem="the same product had two different results"
    )
    assert bad(job.verdict()) == {
        "node-2": "GPU 1: the same product had two different results"
    }


def test_a_node_whose_own_all_reduce_is_slow_is_bad() -> None:
    job = Measured(3)
    for rank in (2, 3):
        job.speeds[rank] = replace(job.speeds[rank], node=9e10)
    assert bad(job.verdict()) == {
        "node-1": "all-reduce in the node 90.0 GB/s, median of its peers 400 GB/s"
    }


@pytest.mark.parametrize("num_nodes", [3, 4, 5, 8])
def test_a_node_is_bad_when_most_of_its_links_are_slow(num_nodes: int) -> None:
    job = Measured(num_nodes)
    job.slow_links("node-1")
    verdict = job.verdict()
    assert list(bad(verdict)) == ["node-1"]
    assert (
        "links 3.00 GB/s or less, median of its peers 45.0 GB/s" in bad(verdict)["node-1"]
    )
    assert verdict.warnings == ()


@pytest.mark.parametrize("num_nodes", [3, 4, 8])
def test_one_slow_link_is_no_reason_to_leave_either_node(num_nodes: int) -> None:
    job = Measured(num_nodes)
    job.slow_links("node-1", "node-2")
    verdict = job.verdict()
    assert verdict.has_passed
    assert verdict.warnings == (
        "the link 192.0.2.1 - 192.0.2.2 is slow: 3.00 GB/s, median 45.0 GB/s",
    )
    assert verdict.sentence().endswith(verdict.warnings[0])


def test_no_node_is_left_out_when_most_would_be() -> None:
    job = Measured(3, 1)
    job.speeds[0] = replace(job.speeds[0], flops=1e14)
    job.speeds[1] = replace(job.speeds[1], memory=1e12)
    verdict = job.verdict()
    assert verdict.has_passed
    assert "no node is left out, because 2 of 3 would be" in verdict.warnings[-1]


def test_the_slower_of_two_nodes_is_bad() -> None:
    job = Measured(2, 1)
    job.speeds[1] = replace(job.speeds[1], flops=3e14)
    assert list(bad(job.verdict())) == ["node-1"]


def test_a_single_node_is_compared_with_published_figures_and_kept() -> None:
    job = Measured(1, 1)
    job.speeds[0] = replace(job.speeds[0], flops=2e14)
    verdict = job.verdict()
    assert verdict.has_passed
    assert verdict.warnings == (
        "node 192.0.2.0: GPU 0: matmul 200 TFLOP/s, published 989 TFLOP/s",
    )


def test_a_part_of_a_gpu_and_an_unknown_device_have_no_published_figures() -> None:
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Intel(R) Xeon(R) CPU @ 2.20GHz"):
        job = Measured(1, 1, device=name)
        job.speeds[0] = replace(job.speeds[0], flops=1e10, memory=1e9)
        assert job.verdict().warnings == ()


# ---- measurements without an end


def test_a_device_that_hangs_makes_its_node_bad() -> None:
    job = Measured(3)
    job.stop([2], "device")
    job.stop([3], "node")
    job.stop([0, 1, 4, 5], "link")
    verdict = job.verdict()
    assert bad(verdict) == {"node-1": "GPU 0: products and copies did not end within 60 s"}


def test_an_all_reduce_that_hangs_in_a_node_makes_it_bad() -> None:
    job = Measured(3)
    job.stop([2, 3], "node")
    job.stop([0, 1, 4, 5], "link")
    assert bad(job.verdict()) == {
        "node-1": "the all-reduce in the node did not end within 60 s"
    }


def test_a_link_that_hangs_is_named_and_those_that_wait_are_not() -> None:
    job = Measured(3, 1)
    # In the first round nodes 0 and 1; node 2 waits for one of them later.
    job.stop([0], "link", 1)
    job.stop([1], "link", 0)
    job.stop([2], "link", next(iter(job.speeds[2].links)))
    verdict = job.verdict()
    assert not verdict.has_passed
    assert verdict.bad == ()
    assert verdict.sentence() == (
        "pre-flight: the link 192.0.2.0 - 192.0.2.1 did not end within 60 s"
    )


def test_a_broken_link_is_named_while_others_still_measure() -> None:
    job = Measured(3, 1)
    job.stop([0], "link", 1)
    job.speeds[0] = replace(job.speeds[0], broken="Connection refused")
    job.stop([2], "device")
    assert job.verdict().sentence() == (
        "pre-flight: the link 192.0.2.0 - 192.0.2.1 does not work: Connection refused"
    )


def test_an_all_reduce_of_all_that_hangs_has_no_culprit() -> None:
    job = Measured(3)
    job.stop(range(6), "world")
    verdict = job.verdict()
    assert verdict.bad == ()
    assert verdict.blocked == "the all-reduce of all ranks did not end within 60 s"


def test_nodes_of_one_address_are_named_with_their_ids() -> None:
    job = Measured(3, 1)
    job.places = [place.model_copy(update={"address": "::1"}) for place in job.places]
    job.speeds[1] = replace(job.speeds[1], memory=1e12)
    assert (
        job.verdict().bad[0].sentence().startswith("node ::1 (node-1): GPU 0: memory 1,000")
    )


def test_thousands_of_ranks_are_judged() -> None:
    job = Measured(512, 8)
    job.speeds[4000] = replace(job.speeds[4000], flops=1e14)
    verdict = job.verdict()
    assert list(bad(verdict)) == ["node-500"]
    data = verdict.to_data()
    assert data["nodes"][0]["node_id"] == "node-500"
    assert (len(data["links"]), data["num_links"]) == (512, 768)
