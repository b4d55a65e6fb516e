"""`megatron-ray cluster check`: measures nodes and links with a job of its own.

The job is admitted, placed and cancelled like any other, so the check takes only what is
free. Must not know: how anything is measured.
"""

import time
from collections.abc import Mapping
from operator import itemgetter
from typing import Annotated, Any

import typer
from rich.markup import escape

from service.cli.commands.clusters.free_nodes import (
    NodeChoice,
    check_spec,
    choose_nodes,
    unknown_names,
)
from service.cli.commands.watch import TERMINAL
from service.cli.connection import DataDir, Token, Url, connect
from service.cli.failure import CommandError
from service.cli.numbers import at_least
from service.cli.output import AsJson, Column, console, print_json, print_page
from service.client import Client
from workers.decisions.preflight.figures import flops_text, rate_text
from workers.protocol.events import EventType
from workers.protocol.states import JobState

_POLL_S = 0.3
_PAGE = 100
_HOLDING = ",".join(state.value for state in JobState if state.holds_resources)
_WAITING = (
    JobState.PREPARING.value,
    JobState.QUEUED.value,
    JobState.SCHEDULING.value,
)
_VERDICTS = f"{EventType.PREFLIGHT_PASSED},{EventType.PREFLIGHT_FAILED}"
Json = Mapping[str, Any]


def check(
    nodes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NODE]...",
            help="Addresses of nodes, or starts of their ids. Default: all that are free.",
            show_default=False,
        ),
    ] = None,
    exclude_bad: Annotated[
        bool, typer.Option("--exclude-bad", help="Exclude the bad nodes.")
    ] = False,
    min_ratio: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=0.99,
            help="Share of the median of its peers below which a node is bad.",
        ),
    ] = 0.8,
    wait_s: Annotated[
        int,
        typer.Option(
            "--timeout",
            parser=at_least(1),
            help="Seconds to wait for the nodes to be free.",
        ),
    ] = 120,
    cluster_name: Annotated[
        str, typer.Option("--cluster", help="Name of the cluster.")
    ] = "default",
    url: Url = None,
    token: Token = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure nodes and links, and name bad ones. Exit code 0 only when there are none."""
    with connect(url, token, data_dir) as client:
        choice = _choose(client, cluster_name, nodes or [])
        job_id = client.submit(check_spec(choice, cluster_name, min_ratio))["id"]
        if not as_json:
            console().print(f"measuring {_count(choice)} in {job_id}")
        try:
            data = _await_verdict(client, job_id, wait_s)
        except KeyboardInterrupt:
            client.cancel(job_id)
            raise
        excluded = []
        if exclude_bad:
            excluded = data["bad"]
        for node in excluded:
            client.exclude(
                cluster_name, node["node_id"], f"cluster check: {node['reason']}"
            )
    left_out = []
    for address, reason in choice.left_out:
        left_out.append({"address": address, "reason": reason})
    if as_json:
        print_json({"job_id": job_id, **data, "not_measured": left_out})
    else:
        _print(data, left_out, has_excluded=exclude_bad)
    if data["bad"] or data["blocked"] is not None:
        raise typer.Exit(1)


def _choose(client: Client, name: str, names: list[str]) -> NodeChoice:
    """Returns the nodes to measure. Raises CommandError when there are none."""
    clusters = {}
    for entry in client.cluster()["data"]:
        clusters[entry["name"]] = entry
    if name not in clusters:
        known = ", ".join(clusters)
        raise CommandError(f"no cluster {name}", remedy=f"known: {known}", exit_code=2)
    cluster = clusters[name]
    unknown = unknown_names(cluster, names)
    if unknown:
        raise CommandError(
            f"no living node {', '.join(unknown)}",
            remedy="`megatron-ray cluster` lists the nodes",
            exit_code=2,
        )
    choice = choose_nodes(cluster, _usage(client, name), names)
    if not choice.nodes:
        raise CommandError(
            f"no node can be measured: {choice.reasons() or 'there is none'}",
            remedy="`megatron-ray cluster` lists the nodes",
        )
    return choice


def _usage(client: Client, cluster: str) -> dict[str, tuple[float, int]]:
    """Returns CPUs and GPUs that the ranks of jobs use, by node id."""
    usage: dict[str, tuple[float, int]] = {}
    for job in client.jobs(status=_HOLDING, limit=_PAGE)["data"]:
        spec = client.show(job["id"]).get("resolved_spec") or {}
        if spec.get("cluster", "default") != cluster:
            continue
        cpus_per_rank = float(spec.get("resources", {}).get("cpus_per_rank", 1.0))
        for rank in client.ranks(job["id"])["data"]:
            cpus, gpus = usage.get(rank["node_id"], (0.0, 0))
            if rank.get("gpu") is not None:
                gpus += 1
            usage[rank["node_id"]] = (cpus + cpus_per_rank, gpus)
    return usage


def _await_verdict(client: Client, job_id: str, wait_s: float) -> dict[str, Any]:
    """Returns the data of the job's verdict. Raises CommandError when it has none."""
    deadline = time.monotonic() + wait_s
    while True:
        # Read before the events: no verdict follows the end.
        job = client.show(job_id)
        events = client.events(job_id, types=_VERDICTS)["data"]
        has_ended = job["status"] in TERMINAL
        if events and has_ended:
            data: dict[str, Any] = events[-1]["data"]
            return data
        if has_ended:
            problem = (job.get("problem") or {}).get("detail") or f"it is {job['status']}"
            raise CommandError(
                f"the check {job_id} has measured nothing: {problem}",
                remedy=f"see `megatron-ray events {job_id}`",
            )
        if job["status"] in _WAITING and time.monotonic() > deadline:
            client.cancel(job_id)
            raise CommandError(
                f"the check {job_id} has not started within {wait_s} s, and is cancelled",
                remedy="other jobs may use the nodes: name free ones, or raise --timeout",
            )
        time.sleep(_POLL_S)


# ---- printing


def _count(choice: NodeChoice) -> str:
    if len(choice.nodes) == 1:
        return "1 node"
    return f"{len(choice.nodes)} nodes"


def _print(data: Json, left_out: list[dict[str, str]], *, has_excluded: bool) -> None:
    bad = set(map(itemgetter("node_id"), data["bad"]))
    columns: dict[str, Column] = {
        "node": lambda node: str(node["address"]),
        "id": lambda node: str(node["node_id"])[:12],
        "ranks": lambda node: str(node["num_ranks"]),
        "device": lambda node: str(node["device"]) or "-",
        "matmul": lambda node: _flops(node["flops"]),
        "memory": lambda node: _rate(node["memory_bytes_per_s"]),
        "all-reduce": lambda node: _rate(node["all_reduce_bytes_per_s"]),
        "": lambda node: "bad" if node["node_id"] in bad else "ok",
    }

    def style(node: Json) -> str:
        return "red" if node["node_id"] in bad else ""

    print_page({"data": data["nodes"]}, False, columns, empty="no nodes", style=style)
    _note_more(data["num_nodes"] - len(data["nodes"]), "nodes")
    if data["links"]:
        _print_links(data)
    out = console()
    for node in data["bad"]:
        out.print(f"[red]bad[/red] {escape(node['address'])}: {escape(node['reason'])}")
    if data["blocked"] is not None:
        out.print(f"[red]{escape(data['blocked'])}[/red]")
    for warning in data["warnings"]:
        out.print(f"[yellow]{escape(warning)}[/yellow]")
    for node in left_out:
        out.print(f"[dim]not measured: {escape(node['address'])} ({node['reason']})[/dim]")
    if data["bad"] and has_excluded:
        out.print(
            "excluded; `megatron-ray cluster include NODE` lets ranks start there again"
        )
    elif data["bad"]:
        out.print(
            "keep jobs from a bad node with `megatron-ray cluster exclude NODE`, or check with "
            "--exclude-bad"
        )


def _print_links(data: Json) -> None:
    columns: dict[str, Column] = {
        "link": lambda link: " - ".join(link["addresses"]),
        "per rank": lambda link: _rate(link["bytes_per_s"]),
        "": lambda link: "slow" if link["is_slow"] else "ok",
    }
    print_page({"data": data["links"]}, False, columns, empty="no links")
    _note_more(data["num_links"] - len(data["links"]), "links")
    rate = data["all_reduce_bytes_per_s"]
    console().print(f"all-reduce of all ranks: {_rate(rate)} per rank")


def _note_more(num_more: int, what: str) -> None:
    if num_more > 0:
        console().print(f"[dim]and {num_more} faster {what}[/dim]")


def _flops(value: float | None) -> str:
    if value is None:
        return "-"
    return flops_text(value)


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return rate_text(value)
