"""Recipes: whole specs of small models, each with the layouts that train it.

They stand in `tests/golden/recipes`, the losses of one rank in `tests/golden/losses`. Losses
are recorded anew, after a change that is meant to change them, by

    python -m tests.support.recipes --record [NAME ...]
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ray.config.train_config import TrainConfig, read_mapping
from megatron_ray.validation.check import find_problems
from megatron_ray.validation.resolution import resolve, world_size

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = tuple(sorted(path.stem for path in (GOLDEN / "recipes").glob("*.yaml")))
STEPS = 10
_REPRODUCIBLE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""Kernels that every processor has, so that all compute the same bits."""
_FEATURES = re.compile(r"\b(?:avx2|avx512f|avx512_bf16|amx_bf16)\b")


def read_recipe(name: str) -> dict[str, Any]:
    return read_mapping(GOLDEN / "recipes" / f"{name}.yaml")


def recipe_config(name: str, parallel: dict[str, Any] | None = None) -> TrainConfig:
    """The spec of a recipe in one of its layouts."""
    spec = read_recipe(name)["spec"]
    model = {"vocab_size": 259, "max_sequence_length": 32, "vocab_multiple": 32}
    training = {
        "seq_length": 32,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "steps": STEPS,
        "seed": 7,
    }
    data = {"train": [{"path": "unused"}], "tokenizer": {"kind": "bytes"}}
    config = TrainConfig.from_mapping(
        {
            **spec,
            "model": model | spec["model"],
            "parallel": {"dp": 1} | (parallel or {}),
            "data": data | spec.get("data", {}),
            "training": training | spec.get("training", {}),
        }
    )
    problems = find_problems(config)
    assert not problems, f"{name}: {problems}"
    return resolve(config, world_size(config))


def processor() -> str:
    """What of this processor may change a kernel, whatever is asked of it."""
    flags = set(_FEATURES.findall(Path("/proc/cpuinfo").read_text()))
    return " ".join(sorted(flags))


def golden(name: str) -> dict[str, Any]:
    """The recorded losses and norms by step, as floats written in hexadecimal, and the
    processors that compute exactly these.
    """
    recorded: dict[str, Any] = json.loads((GOLDEN / "losses" / f"{name}.json").read_text())
    return recorded


def trained(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """The losses and norms of one rank in a process of its own, which fixes the kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.recipes", *names],
        env=os.environ | _REPRODUCIBLE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    return result


def _train(name: str) -> dict[str, list[str]]:
    # Here, since it imports torch, which the caller's process need not.
    from tests.support.parity import run_layout

    result = run_layout(0, 1, recipe_config(name))
    return {
        "loss": [loss.hex() for loss in result.losses],
        "grad_norm": [norm.hex() for norm in result.grad_norms],
    }


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--record"] or NAMES
    if "--record" in sys.argv:
        for name, values in trained(names).items():
            text = json.dumps({"processors": [processor()], **values}, indent=1)
            (GOLDEN / "losses" / f"{name}.json").write_text(text + "\n")
        return
    sys.stdout.write(json.dumps({name: _train(name) for name in names}))


if __name__ == "__main__":
    main()
