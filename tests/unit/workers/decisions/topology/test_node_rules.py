"""Which nodes a job may use, why not others, and the conditions that Ray gets."""

import pytest

from tests.support.ray_scheduler import meets
from workers.decisions.topology.node_rules import (
    IMAGE_LABEL,
    NODE_ID_LABEL,
    NodeRules,
    label_selector,
    type_resources,
)
from workers.protocol.wire import NodeInfo


def node(name: str, **fields: object) -> NodeInfo:
    return NodeInfo(node_id=name, address=f"10.0.0.{len(name)}", **fields)


A = node("a", labels={"pool": "x", "zone": "1"}, accelerator_type="H100", gpus=8)
BB = node("bb", labels={"pool": "y"}, accelerator_type="A100", gpus=8)
CCC = node("ccc", labels={"zone": "1"})
NODES = (A, BB, CCC)

REFUSALS = [
    (
        NodeRules(),
        A.model_copy(update={"storage_ok": False}),
        "it cannot read the job storage",
    ),
    (NodeRules(avoid={"a": "ECC errors"}), A, "ECC errors"),
    (NodeRules(exclude=("pool=x",)), A, "resources.nodes.exclude names it"),
    (NodeRules(exclude=("10.0.0.1",)), A, "resources.nodes.exclude names it"),
    (NodeRules(only=("bb",)), A, "resources.nodes.only does not name it"),
    (NodeRules(only=("pool=x",), exclude=("a",)), A, "resources.nodes.exclude names it"),
    (NodeRules("h100"), A, None),
    (NodeRules("H100"), BB, "it has A100, not H100"),
    (NodeRules("H100"), CCC, "it has no GPU, not H100"),
    (NodeRules(only=("fd00:0::1",)), NodeInfo(node_id="d", address="fd00::1"), None),
]


@pytest.mark.parametrize(("rules", "item", "reason"), REFUSALS)
def test_a_node_is_refused_for_one_named_reason(
    rules: NodeRules, item: NodeInfo, reason: str | None
) -> None:
    assert rules.refusal(item) == reason


SELECTORS = [
    (NodeRules(), {}),
    (NodeRules(only=("pool=x", "pool=y")), {"pool": "in(x,y)"}),
    (NodeRules(only=("pool=x", "pool=y"), exclude=("pool=y",)), {"pool": "in(x)"}),
    (NodeRules(exclude=("pool=x", "zone=1")), {"pool": "!in(x)", "zone": "!in(1)"}),
    # Ray's conditions must all hold, so either of two labels is given by the nodes' ids.
    (NodeRules(only=("pool=y", "zone=1")), {NODE_ID_LABEL: "in(a,bb,ccc)"}),
    (NodeRules(only=("10.0.0.2",)), {NODE_ID_LABEL: "in(bb)"}),
    (NodeRules(only=("10.9.9.9",)), {NODE_ID_LABEL: "in(none)"}),
    (NodeRules(exclude=("10.0.0.2",), avoid={"a": ""}), {NODE_ID_LABEL: "!in(a,bb)"}),
    (
        NodeRules(only=("zone=1",), avoid={"a": ""}),
        {"zone": "in(1)", NODE_ID_LABEL: "!in(a)"},
    ),
    (NodeRules("h100"), {"ray.io/accelerator-type": "H100"}),
]


@pytest.mark.parametrize(("rules", "selector"), SELECTORS)
def test_ray_gets_conditions_that_only_allowed_nodes_meet(
    rules: NodeRules, selector: dict[str, str]
) -> None:
    assert label_selector(NODES, rules) == selector


def test_a_gpu_type_is_a_resource_where_nodes_have_it() -> None:
    typed = A.model_copy(update={"resources": {"accelerator_type:H100": 1.0}})
    rules = NodeRules("h100")
    assert type_resources([typed], rules) == {"accelerator_type:H100": 0.001}
    assert label_selector([typed], rules) == {}
    assert type_resources([typed, A], rules) == {}, "one carries it as a label only"
    # Of no node yet, an autoscaler gets it as the user writes it.
    assert type_resources([], rules) == {"accelerator_type:h100": 0.001}


def test_a_job_runs_on_nodes_of_its_image_only() -> None:
    plain = node("a")
    special = node("b", labels={IMAGE_LABEL: "te-2"})
    default = NodeRules(image="default")
    named = NodeRules(image="te-2")
    assert default.refusal(plain) is None
    assert default.refusal(special) == "it runs image te-2, not default"
    assert named.refusal(special) is None
    assert named.refusal(plain) == "it runs image default, not te-2"
    assert NodeRules().refusal(special) is None
    assert label_selector([plain, special], named) == {IMAGE_LABEL: "te-2"}
    assert label_selector([plain, special], default) == {IMAGE_LABEL: "!in(te-2)"}
    # Where all nodes run one image, Ray is given no condition.
    assert label_selector([plain], default) == {}
    for rules in (default, named):
        selector = label_selector([plain, special], rules)
        for candidate in (plain, special):
            assert meets(candidate, selector) == rules.allows(candidate)
