"""The pods and the Service that KubeRay makes of a RayCluster.

Owns: the rules of KubeRay 1.7 (ray-operator/controllers/ray/common/pod.go and service.go)
as far as the overlays use them:

- `generateRayStartCommand`, `setMissingRayStartParams`, `convertParamMap`: the command line
  of `ray start`, with CPUs, memory and GPUs from the container's resources;
- `BuildPod`: `ulimit -n` before it, `/bin/bash -c --`, `/dev/shm`;
- `setContainerEnvVars`, `configureTokenAuth`: the variables;
- `DefaultWorkerPodTemplate`: the container `wait-gcs-ready`, without the group's `envFrom`;
- `initLivenessAndReadinessProbe`: one path of the dashboard's agent, since Ray 2.53;
- `BuildServiceForHeadPod`: the headless Service `<cluster>-head-svc`;
- of a RayJob its RayCluster, whose name gets a suffix.

Its autoscaler, fault tolerance of the GCS and TLS are left out: asking for one of them is
an error here.
"""

import copy
from typing import Any

Json = dict[str, Any]
GCS_PORT = "6379"
METRICS_PORT = 8080
HEALTH_PORT = 52365
_LEFT_OUT = ("enableInTreeAutoscaling", "gcsFaultToleranceOptions", "tlsOptions")
_UNITS = {"": 1, "m": 1e-3, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
# One value with a meaning of its own; for others `true` alone gives the option.
_BOOLEAN_WITH_VALUE = ("log-color", "include-dashboard", "include-log-monitor")


def pod_templates(cluster: Json) -> dict[str, list[Json]]:
    """Returns the templates of a RayCluster's pods, by group: one for every replica."""
    spec = cluster["spec"]
    for option in _LEFT_OUT:
        assert not spec.get(option), f"{option} is not rehearsed"
    templates = {"headgroup": [_head(cluster)]}
    for group in spec["workerGroupSpecs"]:
        templates[group["groupName"]] = [
            _worker(cluster, group) for _ in range(group["replicas"])
        ]
    return templates


def cluster_of_job(ray_job: Json) -> Json:
    """Returns the RayCluster that KubeRay makes for a RayJob."""
    metadata = ray_job["metadata"]
    return {
        "apiVersion": ray_job["apiVersion"],
        "kind": "RayCluster",
        "metadata": {
            "name": f"{metadata['name']}-x7k2p",
            "namespace": metadata["namespace"],
        },
        "spec": ray_job["spec"]["rayClusterSpec"],
    }


def head_service(cluster: Json) -> Json:
    """Returns the Service of the head."""
    labels = {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/node-type": "head"}
    ports = []
    for port in _ray_container(cluster["spec"]["headGroupSpec"]["template"])["ports"]:
        ports.append({"name": port["name"], "port": port["containerPort"]})
    metadata = {**cluster["metadata"], "name": service_name(cluster), "labels": labels}
    spec = {"clusterIP": "None", "selector": labels, "ports": ports}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def service_name(cluster: Json) -> str:
    """Returns the name of the head's Service."""
    return f"{cluster['metadata']['name']}-head-svc"


def _head(cluster: Json) -> Json:
    group = cluster["spec"]["headGroupSpec"]
    template = _labelled(cluster, group, "head", "headgroup")
    parameters = {"dashboard-host": "0.0.0.0", **group.get("rayStartParams", {})}
    command = _ray_start(template, parameters, "ray start --head ")
    _set_start(template, command)
    _set_environment(cluster, template, command, "127.0.0.1")
    container = _ray_container(template)
    tags = {"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": "kuberay_crd=RayCluster"}
    container["env"].append(tags)
    _set_probes(container, parameters, timeout_s=5)
    return template


def _worker(cluster: Json, group: Json) -> Json:
    template = _labelled(cluster, group, "worker", group["groupName"])
    head = f"{service_name(cluster)}.{cluster['metadata']['namespace']}.svc.cluster.local"
    # Before the variables: KubeRay copies the container as the user has written it.
    waiting = _wait_for_gcs(template, head)
    address = f"{head}:{GCS_PORT}"
    parameters = {"address": address, **group.get("rayStartParams", {})}
    command = _ray_start(template, parameters, "ray start ")
    _set_start(template, command)
    template["spec"].setdefault("initContainers", []).append(waiting)
    for container in (waiting, _ray_container(template)):
        container.setdefault("env", []).append({"name": "FQ_RAY_IP", "value": head})
        container["env"].append({"name": "RAY_IP", "value": service_name(cluster)})
    _set_environment(cluster, template, command, head)
    waiting["env"] += _token(cluster)
    _set_probes(_ray_container(template), parameters, timeout_s=2)
    return template


def _labelled(cluster: Json, group: Json, node_type: str, group_name: str) -> Json:
    template: Json = copy.deepcopy(group["template"])
    own = {
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": node_type,
        "ray.io/group": group_name,
    }
    metadata = template.setdefault("metadata", {})
    metadata["labels"] = {**metadata.get("labels", {}), **own}
    container = _ray_container(template)
    mounted = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
    assert "/dev/shm" in mounted, "KubeRay would add a volume, which is not rehearsed"
    return template


def _ray_container(template: Json) -> Json:
    """Returns Ray's container: the first one."""
    container: Json = template["spec"]["containers"][0]
    return container


def _ray_start(template: Json, parameters: dict[str, str], program: str) -> str:
    """Returns the command line; completes the parameters."""
    resources = _ray_container(template).get("resources", {})
    limits = resources.get("limits", {})
    cpus = limits.get("cpu") or resources.get("requests", {}).get("cpu")
    parameters.setdefault("metrics-export-port", str(METRICS_PORT))
    parameters.setdefault("dashboard-agent-listen-port", str(HEALTH_PORT))
    parameters["block"] = "true"
    if cpus is not None:
        # A part of a CPU counts as a whole one.
        parameters.setdefault("num-cpus", str(-int(-quantity(cpus) // 1)))
    if "memory" in limits:
        parameters.setdefault("memory", str(int(quantity(limits["memory"]))))
    for resource, number in sorted(limits.items()):
        if resource.endswith("gpu") and quantity(number) > 0:
            parameters.setdefault("num-gpus", str(int(quantity(number))))
    options = []
    for name, value in sorted(parameters.items()):
        is_switch = value.lower() in ("true", "false") and name not in _BOOLEAN_WITH_VALUE
        if not is_switch:
            options.append(f" --{name}={value} ")
        elif value.lower() == "true":
            options.append(f" --{name} ")
    return program + "".join(options)


def _set_start(template: Json, command: str) -> None:
    container = _ray_container(template)
    assert "command" not in container, "a command of one's own is not rehearsed"
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {command}"]


def _set_environment(cluster: Json, template: Json, command: str, address: str) -> None:
    variables: list[Json] = [
        _from_field("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        _from_field("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        _from_field("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        _from_field("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
        {"name": "KUBERAY_GEN_RAY_START_CMD", "value": command},
        {"name": "RAY_PORT", "value": GCS_PORT},
        {"name": "RAY_ADDRESS", "value": f"{address}:{GCS_PORT}"},
        {"name": "RAY_USAGE_STATS_KUBERAY_IN_USE", "value": "1"},
        {"name": "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "value": "1"},
        *_token(cluster),
    ]
    container = _ray_container(template)
    own = {variable["name"] for variable in container.setdefault("env", [])}
    for variable in variables:
        if variable["name"] not in own:
            container["env"].append(variable)


def _token(cluster: Json) -> list[Json]:
    """Returns the variables of token authentication."""
    options = cluster["spec"].get("authOptions", {})
    if options.get("mode") != "token":
        return []
    reference = {"name": options["secretName"], "key": "auth_token"}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}},
    ]


def _wait_for_gcs(template: Json, head: str) -> Json:
    """Returns the container that ends once the head answers."""
    container = _ray_container(template)
    check = f"ray health-check --address {head}:{GCS_PORT} > /dev/null 2>&1"
    waiting = {
        "name": "wait-gcs-ready",
        "image": container["image"],
        "command": ["/bin/bash", "-c", "--"],
        "args": [f"until {check}; do sleep 5; done"],
    }
    for key in ("securityContext", "env", "volumeMounts"):
        if key in container:
            waiting[key] = copy.deepcopy(container[key])
    return waiting


def _set_probes(container: Json, parameters: dict[str, str], timeout_s: int) -> None:
    port = int(parameters["dashboard-agent-listen-port"])
    probe = {
        "httpGet": {"path": "/api/healthz", "port": port},
        "periodSeconds": 5,
        "timeoutSeconds": timeout_s,
    }
    liveness = {**probe, "initialDelaySeconds": 30, "failureThreshold": 120}
    readiness = {**probe, "initialDelaySeconds": 10, "failureThreshold": 10}
    container.setdefault("livenessProbe", liveness)
    container.setdefault("readinessProbe", readiness)


def _from_field(name: str, path: str) -> Json:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def quantity(value: str | int | float) -> float:
    """Returns a number of Kubernetes, as in 500m or 8Gi."""
    text = str(value)
    digits = text.rstrip("mKMGTi")
    return float(digits) * _UNITS[text[len(digits) :]]
