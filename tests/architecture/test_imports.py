"""Who may import whom, and what must be importable without torch and Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Everything a service, a validation or a plan needs. `megatron_ray.data.loader` is the
# one file of data/ that may see torch.
TORCH_FREE_PACKAGES = (
    "service",
    "megatron_ray/config",
    "megatron_ray/data",
    "megatron_ray/pipeline_parallel/schedules",
    "megatron_ray/storage",
    "megatron_ray/validation",
    "megatron_ray/planning",
    "megatron_ray/checkpoint/hf/families",
)
TORCH_FREE_FILES = (
    "megatron_ray/parallel_dims.py",
    "megatron_ray/sharding/expert_specs.py",
    "megatron_ray/sharding/layer_specs.py",
    "megatron_ray/sharding/model_specs.py",
    "megatron_ray/sharding/named_layers.py",
    "megatron_ray/sharding/parameter_types.py",
    "megatron_ray/sharding/parameters.py",
    "megatron_ray/sharding/buckets.py",
    "megatron_ray/sharding/row_shards.py",
    "megatron_ray/checkpoint/directory.py",
    "megatron_ray/checkpoint/hf/tensor_locations.py",
    "megatron_ray/checkpoint/hf/hf_config.py",
    "megatron_ray/checkpoint/hf/files.py",
    "megatron_ray/checkpoint/hf/folder.py",
    "megatron_ray/checkpoint/initial_model.py",
    "megatron_ray/checkpoint/train_state.py",
    "megatron_ray/reports.py",
    "megatron_ray/commands.py",
    "workers/protocol/job.py",
    "workers/protocol/states.py",
    "workers/protocol/wire.py",
    "workers/decisions/placement.py",
    "workers/decisions/failures.py",
    "workers/decisions/job_phases.py",
    "workers/decisions/journal_entry.py",
    "workers/decisions/liveness.py",
    "workers/decisions/recovery.py",
    "workers/decisions/restart_policy.py",
    "workers/decisions/slot_assignment.py",
    "workers/exceptions.py",
    "workers/driver/journal.py",
    "workers/rank/spool.py",
    "workers/rank/environment.py",
    "workers/rank/messages.py",
)
NOT_TORCH_FREE = {"megatron_ray.data.loader"}

_IMPORT_ALL = """
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "ray"):
            raise ImportError(name + " is blocked in this test")
sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_import_contracts_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-logo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_service_and_pure_modules_import_with_torch_and_ray_blocked() -> None:
    files = [
        path
        for path in python_files(*TORCH_FREE_PACKAGES)
        if "versions" not in path.parts and path.name != "env.py"
    ]
    names = {
        module_name(path) for path in [*files, *(ROOT / name for name in TORCH_FREE_FILES)]
    } - NOT_TORCH_FREE
    names = {name for name in names if not name.endswith("__main__")}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *sorted(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


MODEL_FILES = python_files("megatron_ray/models")


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_a_model_file_contains_only_the_model(path: Path) -> None:
    forbidden = (
        "torch.distributed",
        "megatron_ray.distributed.mesh",
        "megatron_ray.distributed.collectives",
    )
    forbidden_imports = [
        name for name in imported_names(path) if name.startswith(forbidden)
    ]
    assert forbidden_imports == [], (
        f"{path.name} reaches for ranks or collectives: {forbidden_imports}"
    )
    assert "torch.distributed" not in attribute_chains(path)


def imported_names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def attribute_chains(path: Path) -> set[str]:
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
