"""The file that lists what a cluster may grow to."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from workers.agent.__main__ import app
from workers.agent.node_groups import NodeGroupsError, read_node_groups
from workers.protocol.wire import NodeGroup


def test_groups_are_read(tmp_path: Path) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(
        "- {name: gpu, max_nodes: 8, cpus: 32, gpus: 8, accelerator_type: H100}\n"
        "- {name: cpu, max_nodes: 2, cpus: 16, labels: {pool: small}}\n"
    )
    gpu, cpu = read_node_groups(path)
    assert isinstance(gpu, NodeGroup)
    assert (gpu.name, gpu.max_nodes, gpu.gpus, gpu.accelerator_type) == (
        "gpu",
        8,
        8,
        "H100",
    )
    assert (cpu.gpus, cpu.labels) == (0, {"pool": "small"})


@pytest.mark.parametrize("text", ["", "[]\n", "# none\n"])
def test_a_file_without_groups_means_no_growth(tmp_path: Path, text: str) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(text)
    assert read_node_groups(path) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: gpu, max_nodes: 8}", "/0/cpus"),
        ("- {name: gpu, max_nodes: -1, cpus: 2}", "/0/max_nodes must be at least 0"),
        ("- {name: gpu, max: 1, max_nodes: 1, cpus: 2}", "/0/max "),
        ("- {name: a, max_nodes: 1, cpus: 2}\n- {name: a, max_nodes: 1, cpus: 2}", "twice"),
        ("{name: a}", "must be a list"),
        ("- [", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "groups.yaml"
    path.write_text(text)
    with pytest.raises(NodeGroupsError) as error:
        read_node_groups(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_an_agent_without_its_file_does_not_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--service=http://127.0.0.1:1", "--address=127.0.0.1:1"]
    result = CliRunner().invoke(app, [*options, f"--node-groups={tmp_path / 'none'}"])
    assert result.exit_code == 2
    assert "cannot read the node groups" in caplog.text
