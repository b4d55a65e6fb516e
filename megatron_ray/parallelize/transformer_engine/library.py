"""Loads Transformer Engine, and names what of it is used.

Owns: the only import of the library, and the refusal where it cannot run. Must not know:
layers.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megatron_ray.config.problem import ConfigError
from megatron_ray.config.training import Fp8Config
from megatron_ray.distributed.device_kind import DeviceKind

INSTALL = "pip install --no-build-isolation 'megatron-ray[te]'"

_RECIPES = {
    "current": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
"""`training.fp8.recipe` -> the library's class."""


@dataclass(frozen=True)
class TransformerEngine:
    """The modules of the library, or what stands in for them."""

    pytorch: Any
    """`transformer_engine.pytorch`: layers."""
    recipe: Any
    """`transformer_engine.common.recipe`: recipes of FP8."""

    def fp8_recipe(self, config: Fp8Config) -> Any:
        """Returns the library's recipe for `training.fp8`."""
        formats = self.recipe.Format
        is_hybrid = config.grad_format == "e5m2"
        fp8_format = formats.HYBRID if is_hybrid else formats.E4M3
        make = getattr(self.recipe, _RECIPES[config.recipe])
        return make(fp8_format=fp8_format)


def load_transformer_engine(
    device: DeviceKind, fp8: Fp8Config | None = None
) -> TransformerEngine:
    """Imports the library, which takes some seconds.

    Raises ConfigError without a GPU, without the library, and on a GPU that does not
    multiply in FP8 by the recipe.
    """
    if device.type != "cuda":
        raise ConfigError(
            "/model/spec: transformer_engine computes on NVIDIA GPUs, and this rank computes "
            f"on {device.type}; set it to local"
        )
    # Asked first: without its extension the library raises RuntimeError when imported.
    try:
        version("transformer_engine_torch")
    except PackageNotFoundError as error:
        raise ConfigError(
            "/model/spec: transformer_engine is not installed on this node; install it with "
            f"{INSTALL}, or set it to local"
        ) from error
    if fp8 is not None and not device.multiplies_fp8(fp8.recipe):
        major, minor = device.capability
        raise ConfigError(
            f"/training/fp8/recipe: {fp8.recipe} with spec=transformer_engine needs another "
            f"GPU than this one (compute capability {major}.{minor}); use another recipe, or "
            "set model.spec to local, which emulates it"
        )
    return TransformerEngine(
        import_module("transformer_engine.pytorch"),
        import_module("transformer_engine.common.recipe"),
    )
