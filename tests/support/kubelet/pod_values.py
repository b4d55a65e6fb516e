"""Environment and volumes of a pod's containers, as Kubernetes computes them.

Owns: variables from ConfigMaps, Secrets and fields of the pod, `$(NAME)`, volumes as
folders. Must not know: processes.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.kubelet.sandbox import Mount

Json = dict[str, Any]
_REFERENCE = re.compile(r"\$(\$|\((\w+)\))")
_LABEL = re.compile(r"metadata\.labels\['(.+)'\]")


@dataclass(frozen=True)
class Objects:
    """The applied ConfigMaps, Secrets and priorities, and the folders of claims, by name."""

    config_maps: Mapping[str, Mapping[str, str]]
    secrets: Mapping[str, Mapping[str, str]]
    claims: Mapping[str, Path]
    priorities: Mapping[str, int]

    @classmethod
    def of(cls, manifests: Sequence[Json], claims_folder: Path) -> "Objects":
        """Reads the manifests; a claim gets a folder of its own."""
        config_maps: dict[str, Mapping[str, str]] = {}
        secrets: dict[str, Mapping[str, str]] = {}
        claims: dict[str, Path] = {}
        priorities: dict[str, int] = {}
        for item in manifests:
            name = item["metadata"]["name"]
            if item["kind"] == "ConfigMap":
                config_maps[name] = item.get("data", {})
            elif item["kind"] == "Secret":
                secrets[name] = _secret_values(item)
            elif item["kind"] == "PersistentVolumeClaim":
                claims[name] = claims_folder / name
                claims[name].mkdir(parents=True)
            elif item["kind"] == "PriorityClass":
                priorities[name] = item["value"]
        return cls(config_maps, secrets, claims, priorities)


@dataclass(frozen=True)
class PodFacts:
    """What a container may ask of its own pod."""

    name: str
    namespace: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def field(self, path: str) -> str:
        """Returns the value of a fieldPath. Raises KeyError for one that is not known here."""
        label = _LABEL.fullmatch(path)
        if label is not None:
            return self.labels[label[1]]
        known = {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "status.podIP": self.address,
        }
        return known[path]


def environment(container: Json, objects: Objects, facts: PodFacts) -> dict[str, str]:
    """Returns the variables of a container.

    Raises KeyError for an object or a key that is missing and not optional: the kubelet
    would not start the container.
    """
    variables: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        variables |= _all_of(source, objects)
    for variable in container.get("env", ()):
        if "valueFrom" in variable:
            variables[variable["name"]] = _value_from(variable["valueFrom"], objects, facts)
        else:
            # A variable may refer to those before it.
            variables[variable["name"]] = expanded(variable.get("value", ""), variables)
    return variables


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Fills in `$(NAME)`; `$$` stands for one dollar, and unknown names stay as they are."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] == "$":
            return "$"
        return variables.get(match[2], match[0])

    return _REFERENCE.sub(value_of, text)


def mounts(container: Json, pod_spec: Json, objects: Objects, folder: Path) -> list[Mount]:
    """Returns the mounts of a container; `folder` is the pod's own on this machine."""
    volumes = {volume["name"]: volume for volume in pod_spec.get("volumes", ())}
    result = []
    for item in container.get("volumeMounts", ()):
        volume = volumes[item["name"]]
        source = _volume_folder(volume, objects, folder)
        claim = volume.get("persistentVolumeClaim", {})
        read_only = item.get("readOnly", False) or claim.get("readOnly", False)
        result.append(Mount(str(source), item["mountPath"], read_only))
    return result


def _volume_folder(volume: Json, objects: Objects, folder: Path) -> Path:
    """Returns the folder of a volume. Raises KeyError for a kind that is not known here."""
    if "persistentVolumeClaim" in volume:
        return objects.claims[volume["persistentVolumeClaim"]["claimName"]]
    place: Path = folder / "volumes" / volume["name"]
    if place.exists():
        return place
    contents: Mapping[str, str] = {}
    items: Sequence[Json] = ()
    if "secret" in volume:
        contents = objects.secrets[volume["secret"]["secretName"]]
        items = volume["secret"].get("items", ())
    elif "configMap" in volume:
        contents = objects.config_maps[volume["configMap"]["name"]]
        items = volume["configMap"].get("items", ())
    elif "emptyDir" not in volume:
        raise KeyError(f"volume {volume}")
    place.mkdir(parents=True)
    # Any user of the pod may write to an empty folder.
    place.chmod(0o777)
    paths = {item["key"]: item["path"] for item in items} or {key: key for key in contents}
    for key, path in paths.items():
        (place / path).write_text(contents[key])
    return place


def _all_of(source: Json, objects: Objects) -> Mapping[str, str]:
    prefix = source.get("prefix", "")
    if "configMapRef" in source:
        reference, values = source["configMapRef"], objects.config_maps
    else:
        reference, values = source["secretRef"], objects.secrets
    if reference["name"] not in values and reference.get("optional", False):
        return {}
    return {prefix + key: value for key, value in values[reference["name"]].items()}


def _value_from(source: Json, objects: Objects, facts: PodFacts) -> str:
    if "fieldRef" in source:
        return facts.field(source["fieldRef"]["fieldPath"])
    if "secretKeyRef" in source:
        reference = source["secretKeyRef"]
        return objects.secrets[reference["name"]][reference["key"]]
    reference = source["configMapKeyRef"]
    return objects.config_maps[reference["name"]][reference["key"]]


def _secret_values(secret: Json) -> dict[str, str]:
    values = dict(secret.get("stringData", {}))
    for key, value in secret.get("data", {}).items():
        values[key] = base64.b64decode(value).decode()
    return values
