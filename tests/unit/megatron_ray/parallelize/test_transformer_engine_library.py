"""The library is loaded where it can run, and refused elsewhere with what to do."""

import ast
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from megatron_ray.config.problem import ConfigError
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.config.training import Fp8Config
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.parallelize.parallelize import parallelize
from megatron_ray.parallelize.transformer_engine import library
from megatron_ray.parallelize.transformer_engine.library import load_transformer_engine
from tests.golden.transformer_engine import CLASSES, interface
from tests.support.parity import LLAMA, make_config
from tests.support.transformer_engine import RECORDED, signature

ROOT = Path(__file__).parents[4]
HOPPER = DeviceKind("cuda", bf16_products=True, capability=(9, 0))


def config(**fields: Any) -> TrainConfig:
    return make_config(LLAMA | {"spec": "transformer_engine"} | fields, {"dp": 1}, steps=1)


def test_a_rank_without_a_gpu_says_so() -> None:
    with pytest.raises(ConfigError) as error:
        parallelize(config(), ParallelMesh.single())
    assert str(error.value) == (
        "/model/spec: transformer_engine computes on NVIDIA GPUs, and this rank computes on "
        "cpu; set it to local"
    )


def test_a_node_without_the_library_gets_the_line_that_installs_it() -> None:
    with (
        patch.object(library, "version", side_effect=PackageNotFoundError),
        pytest.raises(ConfigError) as error,
    ):
        load_transformer_engine(HOPPER)
    assert str(error.value) == (
        "/model/spec: transformer_engine is not installed on this node; install it with pip "
        "install --no-build-isolation 'megatron-ray[te]', or set it to local"
    )


def test_a_recipe_for_other_gpus_is_refused() -> None:
    with (
        patch.object(library, "version", return_value="2.20.2"),
        pytest.raises(ConfigError) as error,
    ):
        load_transformer_engine(HOPPER, Fp8Config(recipe="mxfp8"))
    assert str(error.value) == (
        "/training/fp8/recipe: mxfp8 with spec=transformer_engine needs another GPU than this "
        "one (compute capability 9.0); use another recipe, or set model.spec to local, which "
        "emulates it"
    )


def test_two_modules_of_the_library_are_imported() -> None:
    with (
        patch.object(library, "version", return_value="2.20.2"),
        patch.object(library, "import_module", side_effect=str.upper),
    ):
        engine = load_transformer_engine(HOPPER, Fp8Config(recipe="blockwise"))
    assert engine.pytorch == "TRANSFORMER_ENGINE.PYTORCH"
    assert engine.recipe == "TRANSFORMER_ENGINE.COMMON.RECIPE"


def test_every_name_that_is_used_is_recorded() -> None:
    """Calls bind to the recorded signatures where the stand-in runs them; here are the names
    that the code takes from the library's modules.
    """
    folder = ROOT / "megatron_ray" / "parallelize" / "transformer_engine"
    used = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                if node.value.attr == "pytorch":
                    used.add(node.attr)
    assert used == set(RECORDED["pytorch"]) == set(CLASSES["pytorch"])
    recipes = set(RECORDED["common.recipe"])
    assert {"Format", *library._RECIPES.values()} == recipes
    for name in recipes - {"Format"}:
        assert "fp8_format" in RECORDED["common.recipe"][name]["fields"]
    assert {"E4M3", "HYBRID"} <= set(RECORDED["common.recipe"]["Format"]["fields"])


def test_the_release_is_that_of_the_extra() -> None:
    assert (
        "transformer-engine[pytorch,core_cu13]==2.20.*"
        in (ROOT / "pyproject.toml").read_text()
    )
    assert RECORDED["version"].startswith("2.20.")


def test_the_recorder_reads_signatures_without_importing(tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine"
    (package / "pytorch" / "module").mkdir(parents=True)
    (package / "common").mkdir()
    made = "class {}:\n    def __init__(self, a, b=2, *c, d, e='x', **f): ...\n"
    made += "    def forward(self, inp): ...\n"
    names = [name for name in CLASSES["pytorch"] if name != "autocast"]
    (package / "pytorch" / "__init__.py").write_text(
        "from transformer_engine.pytorch.module import "
        + ", ".join(names)
        + "\nfrom .quantization import autocast\n"
    )
    (package / "pytorch" / "module" / "__init__.py").write_text(
        f"from .all_of_them import {', '.join(names)}\n"
    )
    (package / "pytorch" / "module" / "all_of_them.py").write_text(
        "raise RuntimeError\n" + "".join(made.format(name) for name in names)
    )
    (package / "pytorch" / "quantization.py").write_text(made.format("autocast"))
    (package / "common" / "recipe.py").write_text(
        "".join(
            f"class {name}:\n    fp8_format: int = 1\n    E4M3 = 2\n"
            for name in CLASSES["common.recipe"]
        )
    )
    read = interface(tmp_path)
    rows = ["a", "b=2", "*c", "keyword d", "keyword e='x'", "**f"]
    assert read["pytorch"]["Linear"] == {"__init__": rows, "forward": ["inp"]}
    assert read["pytorch"]["autocast"] == {"__init__": rows}
    assert read["common.recipe"]["Format"] == {"fields": ["fp8_format", "E4M3"]}
    assert str(signature(rows)) == "(a, b=2, *c, d, e='x', **f)"
    assert SimpleNamespace(**signature(rows).bind(1, d=2).arguments).d == 2
