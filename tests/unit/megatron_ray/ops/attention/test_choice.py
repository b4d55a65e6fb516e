"""Which kernel attends, on every kind of device, from either machine."""

import pytest

from megatron_ray.distributed import device
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.ops.attention.choice import AttentionKernel, attention_kernel

NEW = DeviceKind("cpu", bf16_products=True)
OLD = DeviceKind("cpu", bf16_products=False)
GPU = DeviceKind("cuda", bf16_products=True)
META = DeviceKind("meta", bf16_products=True)


@pytest.mark.parametrize(
    ("kind", "bf16", "sequence", "window", "chosen"),
    [
        (NEW, True, 256, None, "blocks"),
        (NEW, True, 4096, None, "blocks"),
        (NEW, True, 16, None, "blocks"),
        (NEW, True, 15, None, "fused"),
        (NEW, True, 1, None, "fused"),
        (NEW, True, 256, 256, "blocks"),
        (NEW, True, 256, 255, "stripes"),
        (NEW, False, 256, None, "fused"),
        (OLD, True, 256, None, "fused_in_fp32"),
        (OLD, True, 1, None, "fused_in_fp32"),
        (OLD, True, 256, 255, "stripes"),
        (OLD, False, 256, None, "fused"),
        (GPU, True, 256, None, "fused"),
        (GPU, False, 256, None, "fused"),
        (GPU, True, 256, 255, "masked"),
        (GPU, True, 256, 256, "fused"),
        (META, True, 256, None, "fused"),
        (META, True, 256, 7, "stripes"),
    ],
)
def test_the_device_the_type_and_the_shape_decide(
    kind: DeviceKind, bf16: bool, sequence: int, window: int | None, chosen: AttentionKernel
) -> None:
    assert attention_kernel(kind, bf16=bf16, sequence=sequence, window=window) == chosen


def test_only_bf16_on_a_cpu_that_does_not_multiply_it_is_widened() -> None:
    assert OLD.needs_fp32(bf16=True)
    assert not OLD.needs_fp32(bf16=False)
    assert not any(
        kind.needs_fp32(bf16) for kind in (NEW, GPU, META) for bf16 in (True, False)
    )


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
def test_a_device_says_its_kind(device_type: str) -> None:
    kind = device.kind_of(device_type)
    assert kind.type == device_type
    assert device_type == "cpu" or kind.bf16_products
