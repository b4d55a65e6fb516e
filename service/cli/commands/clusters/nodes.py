"""Commands that show clusters and change the list of excluded nodes.

Must not know: how a node is measured.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.commands.clusters.check import check
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.output import (
    AsJson,
    Column,
    age,
    console,
    duration,
    print_json,
    print_page,
    size,
)

NodeName = Annotated[
    str, typer.Argument(metavar="NODE", help="Address of the node, or start of its id.")
]
ClusterName = Annotated[str, typer.Option("--cluster", help="Name of the cluster.")]


def register(app: typer.Typer) -> None:
    """Adds these commands, as `cluster`."""
    clusters = typer.Typer(invoke_without_command=True)
    clusters.callback()(cluster)
    for command in (check, exclude, include):
        clusters.command(command.__name__)(command)
    app.add_typer(clusters, name="cluster")


def cluster(
    context: typer.Context,
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List the clusters with their agents and nodes."""
    # Called before every command of this group.
    if context.invoked_subcommand is not None:
        return
    with connect(url, token, data_dir) as client:
        page = client.cluster()
    if as_json:
        print_json(page)
        return
    for entry in page["data"]:
        _print_cluster(entry)


def exclude(
    node: NodeName,
    reason: Annotated[str, typer.Option(help="Why, for others.")] = "excluded by hand",
    cluster_name: ClusterName = "default",
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Exclude a node: no rank starts there any more. Running attempts are not touched."""
    with connect(url, token, data_dir) as client:
        entry = client.exclude(cluster_name, node, reason)
    _show_cluster(entry, as_json=as_json)


def include(
    node: NodeName,
    cluster_name: ClusterName = "default",
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Let ranks start on an excluded node again."""
    with connect(url, token, data_dir) as client:
        entry = client.include(cluster_name, node)
    _show_cluster(entry, as_json=as_json)


def _show_cluster(entry: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(entry)
    else:
        _print_cluster(entry)


def _print_cluster(entry: Mapping[str, Any]) -> None:
    columns: dict[str, Column] = {
        "  node": lambda node: f"  {node['address']}",
        "state": _node_state,
        "cpus": lambda node: f"{node['cpus']:g}",
        "gpus": lambda node: f"{node['gpus']:g}",
        "accelerator": lambda node: str(node.get("accelerator_type") or "-"),
        "memory": lambda node: size(node.get("memory_bytes")),
    }
    console().print(_agent_line(entry))
    print_page({"data": entry["nodes"]}, False, columns, empty="  no nodes")
    # A service of an earlier version lists neither.
    for excluded in entry.get("excluded_nodes", ()):
        line = (
            f"  {excluded['address']} ({excluded['node_id'][:12]}) excluded for "
            f"{age(excluded['since'])} by {excluded['by']}: {excluded['reason']}"
        )
        console().print(escape(line))
    for group in entry.get("node_groups", ()):
        console().print(f"  {escape(_group_line(group))}")


def _agent_line(entry: Mapping[str, Any]) -> str:
    """Returns the state of a cluster's agent as console markup."""
    name = escape(str(entry["name"]))
    silence_s = entry.get("agent_silence_s")
    state = "[green]agent connected[/green]"
    if silence_s is None:
        state = "[yellow]agent not connected yet[/yellow]"
    elif not entry["live"]:
        state = f"[red]agent lost for {duration(silence_s)}[/red]"
    parts = [f"[bold]{name}[/bold]  {state}"]
    if entry.get("ray_version"):
        parts.append(f"Ray {escape(str(entry['ray_version']))}")
    parts.append(f"jobs with a driver: {len(entry['drivers'])}")
    if entry["orphans"]:
        parts.append(f"[yellow]actors of no known job: {len(entry['orphans'])}[/yellow]")
    return ", ".join(parts)


def _group_line(group: Mapping[str, Any]) -> str:
    """Returns what a cluster may grow to by one group of nodes."""
    size_of_node = f"{group['cpus']:g} CPUs"
    if group["gpus"]:
        kind = group.get("accelerator_type") or "GPUs"
        size_of_node = f"{size_of_node}, {group['gpus']:g} {kind}"
    return (
        f"may grow to {group['max_nodes']} nodes of {group['name']} ({size_of_node} each)"
    )


def _node_state(node: Mapping[str, Any]) -> str:
    if not node["alive"]:
        return "dead"
    if node.get("storage_ok") is False:
        return "cannot read the storage"
    if node.get("draining"):
        return "draining"
    if node.get("excluded"):
        return "excluded"
    return "alive"
