"""Rehearses an overlay: its pods run as local processes.

    python -m tests.support.rehearsal deaths|one_by_one|deletion|rayjob FOLDER

Runs inside the namespaces of `tests.support.kubelet.sandbox.command_inside`, which end
whatever it leaves. Everything that is started comes from the rendered manifests and from
the Dockerfile of the image.
"""

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.kubelet import kuberay
from tests.support.kubelet.cluster import Cluster
from tests.support.kubelet.pods import Image
from tests.support.manifests import KUBERNETES, ROOT, Json, overlay

DOCKERFILE = ROOT / "deploy/images/cpu/Dockerfile"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SPEC = ROOT / "deploy/jobs/stdlib-tp2.yaml"
SERVICE = "megatron-ray-service"
AGENT = "megatron-ray-agent"
WORKER = "training-workers-0"
HEAD = "training-headgroup-0"
NUM_NODES = 3
"""Nodes of Ray: the head, the agent's pod and the worker."""
STEPS = 20_000
"""More than the job makes until its end is asked for, however fast the machine is."""
EVERY = 20
CHANGES = {
    "data.train": [{"path": "/corpora"}],
    "data.tokenizer": {"kind": "bytes"},
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "training.seq_length": 64,
    "training.global_batch_size": 8,
    "training.steps": STEPS,
    # A rate that does not depend on the number of steps, which is changed at the end.
    "schedule": {"kind": "constant"},
    "checkpoint.every_steps": EVERY,
    # A process that stands by would take its time to start from those that are needed.
    "restart.standby": False,
}
_READY_S = 300.0
_STEP_S = 420.0


def main(name: str, folder: Path) -> None:
    """Runs a rehearsal; an AssertionError names what did not happen."""
    rehearsals = {
        "deaths": ("dev", deaths),
        "one_by_one": ("dev", one_by_one),
        "deletion": ("dev", deletion),
        "rayjob": ("rayjob", ray_job),
    }
    stage, rehearse = rehearsals[name]
    with running(stage, folder) as rehearsal:
        rehearse(rehearsal)


def deaths(rehearsal: "Rehearsal") -> None:
    """Every pod is killed once while a job trains: first the service's, then all of Ray."""
    rehearsal.wait_until_ready()
    rehearsal.submit()
    rehearsal.reach_step(EVERY)
    rehearsal.kill(SERVICE)
    # At a time: what the head's death takes alone, the start of every node, it takes once.
    rehearsal.kill(HEAD, AGENT, WORKER)
    rehearsal.finish()
    rehearsal.require_passed_probes()


def one_by_one(rehearsal: "Rehearsal") -> None:
    """Every pod is killed once while a job trains, which goes on after each death."""
    rehearsal.wait_until_ready()
    rehearsal.submit()
    rehearsal.reach_step(EVERY)
    for owner in (SERVICE, AGENT, WORKER, HEAD):
        rehearsal.kill(owner)
    rehearsal.finish()
    rehearsal.require_passed_probes()


def deletion(rehearsal: "Rehearsal") -> None:
    """The worker's pod is deleted while a job trains, which then repeats no step."""
    rehearsal.wait_until_ready()
    rehearsal.submit()
    rehearsal.reach_step(EVERY)
    rehearsal.delete_worker()


def ray_job(rehearsal: "Rehearsal") -> None:
    """A job with a cluster of its own: both end together."""
    rehearsal.run_ray_job()


@contextmanager
def running(name: str, folder: Path) -> Iterator["Rehearsal"]:
    """The pods of an overlay."""
    tokens = {key: secrets.token_urlsafe(32) for key in ("user", "agent", "Ray's")}
    manifests = [*overlay(name).objects, *example_secrets(tokens)]
    cluster = Cluster(manifests, image(), folder)
    fill_corpora(cluster.objects.claims["corpora"])
    token_file = folder / "user.token"
    token_file.write_text(tokens["user"])
    cluster.start()
    try:
        yield Rehearsal(cluster, token_file)
    finally:
        cluster.kill()


def image() -> Image:
    """Returns what the Dockerfile gives every container; this environment has the files."""
    environment = {"PATH": SYSTEM_PATH}
    text = DOCKERFILE.read_text()
    last_stage = text[text.rindex("\nFROM ") :]
    directory = "/"
    for line in last_stage.splitlines():
        word, _, rest = line.partition(" ")
        if word == "ENV":
            for entry in rest.split():
                key, _, value = entry.partition("=")
                value = value.replace("/opt/venv", sys.prefix)
                environment[key] = value.replace("$PATH", environment["PATH"])
        elif word == "WORKDIR":
            directory = rest
        elif "--home-dir" in line:
            # Docker reads it from the image's list of users.
            environment["HOME"] = line.partition("--home-dir ")[2].split()[0]
    folders = (ROOT, Path(sys.prefix), Path(sys.base_prefix))
    return Image(environment, directory, folders)


def example_secrets(tokens: dict[str, str]) -> list[Json]:
    """Returns the Secrets of the example that `dev` needs, with tokens in them."""
    text = (KUBERNETES / "secrets.example.yaml").read_text()
    for key, token in tokens.items():
        text = text.replace(f"<{key} token>", token).replace(
            f"<{key.capitalize()} token>", token
        )
    needed = ("megatron-ray-tokens", "ray-token")
    manifests = [
        item for item in yaml.safe_load_all(text) if item["metadata"]["name"] in needed
    ]
    assert "<" not in json.dumps(manifests)
    return manifests


def fill_corpora(folder: Path) -> None:
    """Writes a small corpus, as a pod of the user's would."""
    for index in range(60):
        text = " ".join(str(index * number % 97) for number in range(400))
        (folder / f"{index}.txt").write_text(text)


@dataclass(frozen=True)
class Moment:
    """Where the job and the cluster are."""

    step: int
    attempt: int
    nodes: frozenset[str]


class Rehearsal:
    """The running pods and one job."""

    def __init__(self, cluster: Cluster, token_file: Path) -> None:
        self.cluster = cluster
        self.job_id = ""
        self.ray_status = ""
        self._token_file = token_file
        self._began = time.monotonic()
        self._http = httpx.Client(timeout=5, trust_env=False)

    @property
    def url(self) -> str:
        """The service, wherever its pod is now."""
        return f"http://{self.cluster.address('megatron-ray', 8470)}"

    def wait_until_ready(self) -> None:
        """Waits for the service, the agent and all nodes of Ray."""

        self._until(self._is_ready, _READY_S, "the service and three nodes are ready")

    def submit(self) -> None:
        """Submits a job through the command line."""
        self.job_id = json.loads(self._submit(CHANGES, "--json"))["id"]
        self._note(f"submitted {self.job_id}")

    def run_ray_job(self) -> None:
        """Submits a job with a cluster of its own; both end together, as KubeRay sees it."""
        self._until(
            lambda: "status" in self._get("/readyz"), _READY_S, "the service answers"
        )
        changes = {**CHANGES, "cluster": "rayjob-1", "parallel.dp": 1, "training.steps": 60}
        changes["resources.accelerator"] = "cpu"
        template = KUBERNETES / "rendered/rayjob-template.yaml"
        manifest = yaml.safe_load(self._submit(changes, "--rayjob", str(template)))
        (job,) = self._get("/v1/jobs")["data"]
        assert job["status_reason"] == "waiting_agent"
        self.job_id = job["id"]
        ray_cluster = kuberay.cluster_of_job(manifest)
        self.cluster.apply(ray_cluster)
        pods = self.cluster.pods.values()
        # KubeRay starts the entrypoint once all of them are.
        self._until(
            lambda: all(pod.is_ready for pod in pods), _READY_S, "the pods are ready"
        )
        url = f"http://{self.cluster.address(kuberay.service_name(ray_cluster), 8265)}"
        token = self.cluster.objects.secrets["ray-token"]["auth_token"]
        headers = {"x-ray-authorization": f"Bearer {token}"}
        body = {"entrypoint": manifest["spec"]["entrypoint"], "submission_id": "rayjob-1"}
        response = self._http.post(f"{url}/api/jobs/", json=body, headers=headers)
        assert response.status_code == 200, response.text
        self._note("the entrypoint is submitted")

        def has_ended() -> bool:
            answer = self._http.get(f"{url}/api/jobs/rayjob-1", headers=headers).json()
            self.ray_status = str(answer["status"])
            return self.ray_status in ("SUCCEEDED", "FAILED", "STOPPED")

        self._until(has_ended, _STEP_S, "the entrypoint has ended")
        assert self.ray_status == "SUCCEEDED"
        assert self._job()["status"] == "succeeded", self._job()

    def reach_step(self, step: int) -> None:
        """Waits until the job has made that step."""
        self._until(lambda: self._step() >= step, _STEP_S, f"step {step} is made")

    def kill(self, *owners: str) -> None:
        """Kills pods; their controllers make other ones, and the job goes on.

        Of the head's pod it kills the container, which the kubelet starts again.
        """
        before = self._now()
        new_nodes = 0
        for owner in owners:
            if owner == HEAD:
                self.cluster.pods[owner].kill_container("ray-head")
            else:
                pod = self.cluster.replace(owner)
                new_nodes += int("ray-cluster" in pod.setup.facts.labels)
        if HEAD in owners:
            # Without its head a node of Ray ends, and starts again as a new one.
            new_nodes = NUM_NODES
        self._goes_on(before, ", ".join(owners), new_nodes=new_nodes)

    def delete_worker(self) -> None:
        """Deletes the worker's pod as Kubernetes does; the job goes on without loss."""
        before = self._now()
        pod = self.cluster.pods[WORKER]
        grace_s = pod.setup.spec["terminationGracePeriodSeconds"]
        seconds = self.cluster.delete(WORKER)
        what = f"the worker's pod, which ended in {seconds:.0f} s of {grace_s} s,"
        assert seconds < grace_s
        self._goes_on(before, what, new_nodes=1)

        def steps(attempt: int) -> list[int]:
            rows = self._get(f"/v1/jobs/{self.job_id}/metrics?attempt={attempt}")
            return [row["step"] for row in rows.get("data", ())]

        following = before.attempt + 1
        self._until(lambda: bool(steps(following)), _STEP_S, "the next attempt makes steps")
        assert steps(following)[0] == steps(before.attempt)[-1] + 1

    def finish(self) -> None:
        """Shortens the job, waits for its end, and looks at its steps."""
        self._cli("cancel", self.job_id)
        self._until(self._has_status("cancelled"), _STEP_S, "the job is cancelled")
        steps = self._step() + EVERY
        self._cli("resume", self.job_id, "--set", f"training.steps={steps}")
        self._until(self._has_status("succeeded"), _STEP_S, f"the job ends after {steps}")
        assert self._step() == steps
        rows = self._get(f"/v1/jobs/{self.job_id}/metrics")["data"]
        assert [row["step"] for row in rows] == list(range(1, steps + 1))
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert self.cluster.errors() == []

    def require_passed_probes(self) -> None:
        """Every probe of every container has succeeded."""

        def unpassed() -> list[str]:
            return [
                f"{pod.setup.facts.name}/{container.name}: {kind}"
                for pod in self.cluster.pods.values()
                for container in pod.containers
                for kind in container.probes - container.passed
            ]

        self._until(lambda: not unpassed(), _STEP_S, "all probes have passed")

    def _goes_on(self, before: "Moment", what: str, *, new_nodes: int) -> None:
        self._note(f"away: {what} at step {before.step} of attempt {before.attempt}")

        def goes_on() -> bool:
            if not self._is_ready():
                return False
            now = self._now()
            return now.step > before.step and len(now.nodes - before.nodes) == new_nodes

        self._until(goes_on, _STEP_S, f"the job has gone on from step {before.step}")

    def _is_ready(self) -> bool:
        """Whether service and agent work, and all nodes of Ray are there."""
        return (
            self._get("/readyz").get("status") == "ok" and len(self._nodes()) == NUM_NODES
        )

    def _now(self) -> "Moment":
        job = self._job()
        return Moment(self._step(), job.get("attempt", 0), self._nodes())

    def _has_status(self, status: str) -> Callable[[], bool]:
        return lambda: self._job().get("status") == status

    def _step(self) -> int:
        return (self._job().get("progress") or {}).get("step") or 0

    def _job(self) -> Json:
        return self._get(f"/v1/jobs/{self.job_id}")

    def _nodes(self) -> frozenset[str]:
        """Returns the nodes of Ray that can run ranks or drivers."""
        clusters = self._get("/v1/cluster").get("data", ())
        return frozenset(
            node["node_id"]
            for cluster in clusters
            for node in cluster["nodes"]
            if node["alive"] and node["storage_ok"]
        )

    def _get(self, path: str) -> Json:
        """Returns an answer; nothing while the service is away."""
        headers = {"Authorization": f"Bearer {self._token_file.read_text()}"}
        try:
            response = self._http.get(self.url + path, headers=headers)
        except httpx.TransportError:
            return {}
        answer: Json = response.json()
        return answer

    def _submit(self, changes: dict[str, Any], *options: str) -> str:
        words = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
        return self._cli("submit", str(SPEC), *words, *options)

    def _cli(self, *words: str) -> str:
        """Returns what the command line prints."""
        command = [f"{sys.prefix}/bin/megatron-ray", *words, "--url", self.url]
        result = subprocess.run(
            [*command, "--token", f"@{self._token_file}"], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def _until(self, reached: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
            assert self.cluster.errors() == []
            time.sleep(0.2)
        self._note(what)

    def _note(self, text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - self._began:6.1f} s  {text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
