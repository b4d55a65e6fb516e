"""Every container starts what this repository has, as a user who may do little."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from ray.scripts.scripts import cli as ray_cli

from service.http.tokens import read_tokens
from service.local_stack.ray_head import head_command, ray_environment
from service.main import refuse_open_bind
from service.settings import PREFIX, Settings
from tests.support.manifests import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Json,
    documents,
    named,
    overlay,
)
from workers.agent.__main__ import app as agent_app
from workers.agent.node_groups import read_node_groups
from workers.rank.environment import AGENT_TOKEN, AGENT_TOKEN_FILE

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"megatron-ray-cpu": "cpu", "megatron-ray-gpu": "gpu"}
OTHERS = {"redis:7.4-bookworm"}
# Ray's own, which `up` does not need: see the file that sets it.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
TOKEN_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}


def script(container: Json) -> str:
    command = container["command"]
    assert command[:2] == ["/bin/sh", "-c"]
    return str(command[2]).replace("\\\n", " ")


def last_command(container: Json) -> list[str]:
    """Returns what the shell of a container becomes, with its variables filled in."""
    text = script(container)
    for variable in container["env"]:
        text = text.replace(f'"${variable["name"]}"', variable.get("value", ""))
    line = text.strip().splitlines()[-1]
    words = shlex.split(line)
    assert words[0] == "exec"
    return words[1:]


def arguments(command: Any, words: list[str]) -> dict[str, Any]:
    """Returns the options that a command line sets.

    `command` is the program's own parser, of click or of typer.
    """
    options: dict[str, Any] = command.make_context(str(command.name), words).params
    return options


def expanded(word: str, variables: dict[str, str]) -> str:
    """Fills in variables as a shell does."""
    for name, value in variables.items():
        word = word.replace(f"${{{name}}}", value).replace(f"${name}", value)
    return word


# ---- what is started


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_agent_starts_with_options_that_it_knows(name: str) -> None:
    stage = overlay(name)
    pod = stage.pod("megatron-ray-agent")
    words = last_command(pod.container("agent"))
    assert words[:3] == ["python", "-m", "workers.agent"]
    options = arguments(typer.main.get_command(agent_app), words[3:])
    service = stage.one("Service", "megatron-ray")
    assert (
        options["service"] == f"http://megatron-ray:{service['spec']['ports'][0]['port']}"
    )
    assert options["cluster"] in Settings().clusters
    assert str(options["token_file"]) == "/etc/megatron-ray/agent"
    folder = mount_path(pod.container("agent"), "node-groups")
    assert str(options["node_groups"]) == f"{folder}/groups.yaml"
    # The Service that KubeRay makes for the head of a RayCluster, and Ray's default port.
    assert options["address"] == "training-head-svc:6379"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_agent_knows_what_the_autoscaler_may_make(name: str, tmp_path: Path) -> None:
    stage = overlay(name)
    volume = named(stage.pod("megatron-ray-agent").spec["volumes"], "node-groups")
    data = stage.one("ConfigMap", volume["configMap"]["name"])["data"]
    path = tmp_path / "groups.yaml"
    path.write_text(data["groups.yaml"])
    expected = []
    if stage.ray_cluster.get("enableInTreeAutoscaling"):
        for group in stage.ray_cluster["workerGroupSpecs"]:
            requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
            # Ray counts a node's limits, and what it requests where it has none.
            size = (float(requests["cpu"]), float(requests.get("nvidia.com/gpu", 0)))
            expected.append((group["groupName"], group["maxReplicas"], *size))
    groups = read_node_groups(path)
    assert expected == [
        (group.name, group.max_nodes, group.cpus, group.gpus) for group in groups
    ]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_agent_comes_after_a_node_of_ray_without_cpus(name: str) -> None:
    pod = overlay(name).pod("megatron-ray-agent")
    # It finds the node by its process, and talks to it through sockets and shared memory.
    assert pod.spec["shareProcessNamespace"] is True
    (node,) = pod.spec["initContainers"]
    assert node["restartPolicy"] == "Always", "else the agent would wait for its end"
    assert node["startupProbe"]
    for path in ("/tmp", "/dev/shm"):
        assert mount(node, path) == mount(pod.container("agent"), path)
    words = last_command(node)
    assert words[:2] == ["ray", "start"]
    options = arguments(ray_cli.commands["start"], words[2:])
    assert (options["num_cpus"], options["num_gpus"]) == (0, 0)
    assert options["address"] == "training-head-svc:6379"
    assert options["block"] is True
    ports = {port["name"]: port["containerPort"] for port in node["ports"]}
    assert options["metrics_export_port"] == ports["metrics"]
    assert options["dashboard_agent_listen_port"] == ports["health"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_both_containers_of_the_agent_wait_for_the_head_alike(name: str) -> None:
    pod = overlay(name).pod("megatron-ray-agent")
    waits = {script(container).splitlines()[0] for container in pod.containers}
    assert len(waits) == 1
    words = shlex.split(waits.pop().removeprefix("until ").partition(" >")[0])
    assert words[:2] == ["ray", "health-check"]
    arguments(ray_cli.commands["health-check"], words[2:])


@pytest.mark.parametrize("name", OVERLAYS)
def test_nodes_of_ray_start_with_options_that_it_knows(name: str) -> None:
    cluster = overlay(name).ray_cluster
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        words = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        arguments(ray_cli.commands["start"], words)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_object_store_is_as_small_as_that_of_a_local_stack(tmp_path: Path) -> None:
    (word,) = [
        word
        for word in head_command(dict.fromkeys(PORTS, 1), tmp_path, 2)
        if word.startswith("--object-store-memory=")
    ]
    cluster = overlay("gpu").ray_cluster
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert word.endswith("=" + group["rayStartParams"]["object-store-memory"])
    assert word in last_command(
        overlay("gpu").pod("megatron-ray-agent").container("ray-node")
    )


PORTS = (
    "ray_gcs",
    "ray_node_manager",
    "ray_object_manager",
    "ray_client",
    "ray_dashboard",
    "ray_dashboard_agent_grpc",
    "ray_dashboard_agent_http",
    "ray_metrics",
    "ray_runtime_env_agent",
)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_cluster_runs_the_version_of_ray_that_is_installed(name: str) -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={overlay(name).ray_cluster['rayVersion']}" in pins


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_are_those_that_this_repository_builds(name: str) -> None:
    for place, container in overlay(name).containers():
        if place == "ray-head/autoscaler" or container["image"] in OTHERS:
            continue
        image, _, tag = container["image"].partition(":")
        assert tag == PROJECT["version"], place
        assert (ROOT / "deploy/images" / OURS[image] / "Dockerfile").exists(), place


# ---- with which environment


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_service_understands_its_settings(name: str, tmp_path: Path) -> None:
    stage = overlay(name)
    container = stage.pod("megatron-ray-service").container("service")
    assert container["command"] == ["python", "-m", "service.main"]
    variables = stage.environment(container)
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    assert set(variables) <= known
    settings = Settings.from_environment(variables)
    (port,) = container["ports"]
    assert settings.port == port["containerPort"]
    assert settings.data_prefixes
    assert settings.storage_prefixes
    # With the file that the pod mounts there, other pods may connect.
    assert str(settings.tokens_file) == mount_path(container, "tokens") + "/tokens.json"
    tokens_file = tmp_path / "tokens.json"
    tokens_file.write_text(json.dumps({"user": "u" * 43, "agent": "a" * 43}))
    refuse_open_bind(settings.model_copy(update={"tokens_file": tokens_file}))


@pytest.mark.parametrize("name", OVERLAYS)
def test_nodes_of_ray_get_the_environment_of_a_local_stack(name: str) -> None:
    stage = overlay(name)
    expected = {}
    for variable, value in ray_environment("token", Path("/tmp")).items():
        is_given_otherwise = variable.startswith("RAY_AUTH") or variable == "TMPDIR"
        if value is not None and not is_given_otherwise:
            expected[variable] = value
    # A pod's user is not root, whatever the user of this test is.
    expected["RAY_worker_niceness"] = "0"
    for owner in ("ray-head", stage.ray_cluster["workerGroupSpecs"][0]["groupName"]):
        variables = stage.environment(stage.pod(owner).spec["containers"][0])
        variables.pop(RECONNECT, None)
        variables.pop("DRAIN_S", None)
        assert variables == {**expected, "HOME": "/tmp"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_agent_gets_no_variable_that_has_no_reader(name: str) -> None:
    stage = overlay(name)
    for container in stage.pod("megatron-ray-agent").containers:
        own = {variable["name"] for variable in container["env"]}
        used = set(re.findall(r"\$(\w+)", script(container)))
        assert used <= own
        assert own == used | TOKEN_VARIABLES
        # The token of the agent is a file, so that no process shows it.
        assert not own & {AGENT_TOKEN, AGENT_TOKEN_FILE}


@pytest.mark.parametrize("name", OVERLAYS)
def test_ray_asks_for_a_token(name: str) -> None:
    stage = overlay(name)
    auth = stage.ray_cluster["authOptions"]
    assert auth == {"mode": "token", "secretName": "ray-token"}
    for container in stage.pod("megatron-ray-agent").containers:
        variables = stage.environment(container)
        assert variables["RAY_AUTH_MODE"] == "token"
        path = variables["RAY_AUTH_TOKEN_PATH"]
        # KubeRay reads the key auth_token of the same Secret.
        assert path == mount_path(container, "ray-token") + "/auth_token"


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_variable_is_injected_for_a_service(name: str) -> None:
    # MEGATRON_RAY_PORT would be a URL.
    for pod in overlay(name).pods():
        assert pod.spec["enableServiceLinks"] is False, pod.owner


@pytest.mark.parametrize("name", OVERLAYS)
def test_whatever_a_container_refers_to_is_there(name: str) -> None:
    stage = overlay(name)
    claims = {item["metadata"]["name"] for item in stage.of_kind("PersistentVolumeClaim")}
    accounts = {item["metadata"]["name"] for item in stage.of_kind("ServiceAccount")}
    priorities = {item["metadata"]["name"] for item in stage.of_kind("PriorityClass")}
    for pod in stage.pods():
        assert pod.spec["serviceAccountName"] in accounts
        assert pod.spec["priorityClassName"] in priorities
        volumes = pod.spec.get("volumes", [])
        for volume in volumes:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in pod.containers:
            for item in container["volumeMounts"]:
                if pod.owner != "redis":
                    named(volumes, item["name"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_secret_is_in_the_example_and_in_the_readme(name: str) -> None:
    example = {}
    for secret in documents(KUBERNETES / "secrets.example.yaml"):
        example[secret["metadata"]["name"]] = set(secret["stringData"])
    readme = (KUBERNETES / "README.md").read_text()
    for secret_name, keys in secret_references(overlay(name).objects):
        assert keys <= example[secret_name]
        assert f"create secret generic {secret_name} " in readme


def secret_references(value: Any) -> list[tuple[str, set[str]]]:
    """Returns every reference to a Secret, with the keys that it needs."""
    references = []
    if isinstance(value, dict):
        if "secretKeyRef" in value:
            reference = value["secretKeyRef"]
            references.append((reference["name"], {reference["key"]}))
        if "secretRef" in value:
            references.append((value["secretRef"]["name"], set()))
        if "secretName" in value:
            items = value.get("items", ())
            references.append((value["secretName"], {item["key"] for item in items}))
        if "credentials" in value and isinstance(value["credentials"], dict):
            reference = value["credentials"]
            references.append((reference["name"], {reference["key"]}))
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            references += secret_references(item)
    return references


# ---- where


@pytest.mark.parametrize("name", OVERLAYS)
def test_jobs_lie_at_one_path_in_every_pod(name: str) -> None:
    stage = overlay(name)
    service = stage.pod("megatron-ray-service").container("service")
    settings = Settings.from_environment(stage.environment(service))
    for pod in stage.pods():
        for container in pod.containers:
            if pod.owner != "redis":
                path = mount_path(container, "jobs")
                assert path == str(settings.jobs_dir), container["name"]
    # Paths of data are checked and read on nodes of Ray.
    assert settings.data_prefixes
    for pod in stage.pods():
        if "ray-cluster" in pod.labels:
            container = pod.containers[0]
            assert mount_path(container, "corpora") == settings.data_prefixes[0]


def mount(container: Json, path: str) -> str:
    """Returns the volume that a container mounts at a path."""
    for item in container["volumeMounts"]:
        if item["mountPath"] == path:
            return str(item["name"])
    raise AssertionError(f"{container['name']} mounts nothing at {path}")


def mount_path(container: Json, volume: str) -> str:
    return str(named(container["volumeMounts"], volume)["mountPath"])


# ---- as whom


@pytest.mark.parametrize("name", OVERLAYS)
def test_containers_may_do_as_little_as_possible(name: str) -> None:
    for place, container in overlay(name).containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, place
        assert container["resources"]["requests"], place
        assert "memory" in container["resources"]["limits"], place


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_run_as_users_without_rights_in_the_cluster(name: str) -> None:
    stage = overlay(name)
    for account in stage.of_kind("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert stage.of_kind("Role") + stage.of_kind("ClusterRole") == []
    users = {}
    for pod in stage.pods():
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        users[pod.owner] = context["runAsUser"]
    users.pop("redis", None)
    # Files of a job are private to their owner.
    assert set(users.values()) == {1000}


@pytest.mark.parametrize("name", ["gpu", "production"])
def test_only_the_autoscaler_gets_a_token_of_kubernetes(name: str) -> None:
    stage = overlay(name)
    (volume,) = [
        volume["name"]
        for volume in stage.pod("ray-head").spec["volumes"]
        if "projected" in volume
    ]
    holders = []
    for place, container in stage.containers():
        if volume in [item["name"] for item in container["volumeMounts"]]:
            holders.append(place)
    assert holders == ["ray-head/autoscaler"]


# ---- how it ends, and how it grows


@pytest.mark.parametrize("name", OVERLAYS)
def test_one_service_and_one_agent_at_a_time(name: str) -> None:
    for owner in ("megatron-ray-service", "megatron-ray-agent"):
        spec = overlay(name).one("Deployment", owner)["spec"]
        assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_with_ranks_waits_for_them_before_it_ends(name: str) -> None:
    group = overlay(name).ray_cluster["workerGroupSpecs"][0]
    spec = group["template"]["spec"]
    (worker,) = spec["containers"]
    variables = overlay(name).environment(worker) | {"RAY_ADDRESS": "head:6379"}
    lines = script(worker["lifecycle"]["preStop"]["exec"]).splitlines()
    assert lines[0].startswith("node=$(grep ")
    words = shlex.split(lines[1])
    assert words[:2] == ["ray", "drain-node"]
    words = [expanded(word, {**variables, "node#*=": "ab" * 28}) for word in words[2:]]
    options = arguments(ray_cli.commands["drain-node"], words)
    assert options["node_id"] == "ab" * 28
    # Ray names the process of an actor after its class.
    assert "[R]ankWorker" in lines[2]
    drain_s = int(variables["DRAIN_S"])
    assert options["deadline_remaining_seconds"] == drain_s
    assert 100 <= drain_s < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(
    ("name", "replicas"),
    [
        ("dev", (1, 1, 1)),
        ("gpu", (0, 0, 8)),
        ("production", (0, 0, 8)),
        ("kueue", (1, 1, 1)),
    ],
)
def test_groups_have_the_sizes_of_their_overlay(
    name: str, replicas: tuple[int, int, int]
) -> None:
    (group,) = overlay(name).ray_cluster["workerGroupSpecs"]
    sizes = (group["replicas"], group["minReplicas"], group["maxReplicas"])
    assert sizes == replicas
    is_scaled = overlay(name).ray_cluster.get("enableInTreeAutoscaling", False)
    assert is_scaled is (replicas[1] < replicas[2])


@pytest.mark.parametrize("name", ["gpu", "production", "kueue"])
def test_a_drained_node_leaves_the_head_alone(name: str) -> None:
    (budget,) = overlay(name).of_kind("PodDisruptionBudget")
    labels = overlay(name).pod("ray-head").labels.items()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    assert budget["spec"]["minAvailable"] == 1


def test_a_head_in_production_may_die() -> None:
    stage = overlay("production")
    options = stage.ray_cluster["gcsFaultToleranceOptions"]
    (port,) = stage.one("Service", "redis")["spec"]["ports"]
    assert options["redisAddress"] == f"redis:{port['port']}"
    secret = {"name": "redis", "key": "password"}
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == secret
    node = stage.pod("megatron-ray-agent").container("ray-node")
    assert stage.environment(node)[RECONNECT] == "600"


def test_production_keeps_its_state_in_postgres() -> None:
    container = overlay("production").pod("megatron-ray-service").container("service")
    variable = named(container["env"], "MEGATRON_RAY_DATABASE_URL")
    reference = {"name": "database", "key": "url"}
    assert variable["valueFrom"]["secretKeyRef"] == reference


def test_a_cluster_of_kueue_waits_in_its_queue() -> None:
    stage = overlay("kueue")
    (queue,) = stage.of_kind("LocalQueue")
    labels = stage.one("RayCluster", "training")["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]


def test_the_example_has_tokens_of_the_form_that_the_service_reads(tmp_path: Path) -> None:
    secrets = documents(KUBERNETES / "secrets.example.yaml")
    text = secrets[0]["stringData"]["tokens.json"]
    path = tmp_path / "tokens.json"
    path.write_text(
        text.replace("<user token>", "u" * 43).replace("<agent token>", "a" * 43)
    )
    assert len(read_tokens(path)) == 2
