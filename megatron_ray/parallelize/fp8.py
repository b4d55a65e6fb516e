"""Makes the linear layers of a model multiply in FP8.

Owns: which layers do, and which of their operands are split over ranks. Must not know:
formulas of scales, the order of assembly.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from megatron_ray.config.training import Fp8Config
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.expert_parallel.layers import GroupedLinear
from megatron_ray.models.gpt import GPT
from megatron_ray.ops.fp8.delayed import DelayedRule, DelayedScaling, LayerScales
from megatron_ray.ops.fp8.products import Fp8GroupedMultiplication, Fp8Multiplication
from megatron_ray.ops.fp8.quantize import E4M3, E5M2
from megatron_ray.ops.fp8.recipe import ROLES, Recipe
from megatron_ray.tensor_parallel.layers import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)


def apply_fp8(
    module: GPT, config: Fp8Config | None, mesh: ParallelMesh
) -> DelayedScaling | None:
    """Makes a model's layers multiply in FP8, if there is a config for that.

    Returns their scales with delayed scaling.
    """
    if config is None:
        return None
    recipe = recipe_of(config, mesh.device_kind)
    layers = dict(_linear_layers(module, config))
    scaling = None
    if config.recipe == "delayed":
        rule = DelayedRule(
            config.amax_history_length, config.amax_algorithm == "max", config.margin
        )
        scaling = DelayedScaling(tuple(layers), recipe, rule, mesh.device)
    for index, layer in enumerate(layers.values()):
        scales = None
        if scaling is not None:
            scales = scaling.layer(index)
        _set_multiplication(layer, recipe, mesh, scales)
    return scaling


def scales_of_gathers(module: GPT, config: Fp8Config | None) -> dict[str, int]:
    """Returns the weights that ZeRO-3 gathers in FP8, by name -> number of their scales."""
    scales: dict[str, int] = {}
    if config is None or not config.param_gather:
        return scales
    for name, layer in _linear_layers(module, config):
        scales[f"{name}.weight"] = 1
        if isinstance(layer, GroupedLinear):
            scales[f"{name}.weight"] = layer.num_experts
    return scales


def recipe_of(config: Fp8Config, device: DeviceKind) -> Recipe:
    """Returns how operands are quantized and multiplied on a device."""
    grad_dtype = E5M2 if config.grad_format == "e5m2" else E4M3
    recipe = Recipe(grad_dtype, "tensorwise")
    if config.recipe == "mxfp8":
        recipe = Recipe(grad_dtype, "mxfp8", (1, 32), (1, 32))
    elif config.recipe == "blockwise":
        recipe = Recipe(grad_dtype, "blockwise", (1, 128), (128, 128))
    if not device.multiplies_fp8(config.recipe):
        return replace(recipe, kernel="emulated")
    return recipe


def _linear_layers(module: GPT, config: Fp8Config) -> Iterator[tuple[str, nn.Module]]:
    """Yields the layers that multiply in FP8, by logical name.

    Those are all linear layers of blocks, without routers, and MTP's projections.
    """
    kinds = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, GroupedLinear)
    num_layers = module.config.num_layers
    for name, part in module.named_modules():
        # Both `layers.<index>` and `mtp.<depth>` count from 0.
        kind, _, rest = name.partition(".")
        if not isinstance(part, kinds):
            continue
        index = int(rest.split(".")[0])
        if kind == "mtp":
            index += num_layers
        if config.covers(index, num_layers):
            yield name, part


def _set_multiplication(
    layer: nn.Module, recipe: Recipe, mesh: ParallelMesh, scales: LayerScales | None
) -> None:
    if isinstance(layer, GroupedLinear):
        # Of both of an expert's layers one operand is whole on each rank, and does not
        # change in the maximum.
        of_expert = Fp8Multiplication(recipe, mesh.etp_group, ROLES, scales)
        layer.multiplication = Fp8GroupedMultiplication(of_expert)
    elif isinstance(layer, ColumnParallelLinear):
        group = layer.tp.group
        layer.multiplication = Fp8Multiplication(recipe, group, ("weight", "grad"), scales)
    elif isinstance(layer, RowParallelLinear):
        group = layer.tp.group
        layer.multiplication = Fp8Multiplication(
            recipe, group, ("inputs", "weight"), scales
        )
    elif isinstance(layer, ReplicatedLinear):
        # Without sequence parallelism all ranks have the same rows.
        group = mesh.tp_group
        layer.multiplication = Fp8Multiplication(recipe, group, ("inputs", "grad"), scales)
