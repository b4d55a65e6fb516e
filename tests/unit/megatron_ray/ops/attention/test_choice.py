"""Which kernel attends, on every kind of device, from either machine."""

import pytest

from megatron_ray.distributed import device
from megatron_ray.distributed.device_kind import DeviceKind
from megatron_ray.ops.attention.choice import (
    AttentionKernel,
    DocumentKernel,
    attention_kernel,
    document_kernel,
)

NEW = DeviceKind("cpu", bf16_products=True)
OLD = DeviceKind("cpu", bf16_products=False)
GPU = DeviceKind("cuda", bf16_products=True)
META = DeviceKind("meta", bf16_products=True)


@pytest.mark.parametrize(
    ("kind", "precision", "sequence", "window", "chosen"),
    [
        (NEW, "bf16", 256, None, "blocks"),
        (NEW, "bf16", 4096, None, "blocks"),
        (NEW, "bf16", 16, None, "blocks"),
        (NEW, "bf16", 15, None, "fused"),
        (NEW, "bf16", 1, None, "fused"),
        (NEW, "bf16", 256, 256, "blocks"),
        (NEW, "bf16", 256, 255, "stripes"),
        (NEW, "fp32", 256, None, "fused"),
        (OLD, "bf16", 256, None, "fused_in_fp32"),
        (OLD, "bf16", 1, None, "fused_in_fp32"),
        (OLD, "bf16", 256, 255, "stripes"),
        (OLD, "fp32", 256, None, "fused"),
        (NEW, "fp16", 256, None, "fused_in_fp32"),
        (NEW, "fp16", 256, 255, "stripes"),
        (GPU, "fp16", 256, None, "fused"),
        (GPU, "bf16", 256, None, "fused"),
        (GPU, "fp32", 256, None, "fused"),
        (GPU, "bf16", 256, 255, "masked"),
        (GPU, "bf16", 256, 256, "fused"),
        (META, "bf16", 256, None, "fused"),
        (META, "bf16", 256, 7, "stripes"),
    ],
)
def test_the_device_the_type_and_the_shape_decide(
    kind: DeviceKind,
    precision: str,
    sequence: int,
    window: int | None,
    chosen: AttentionKernel,
) -> None:
    kernel = attention_kernel(kind, precision=precision, sequence=sequence, window=window)
    assert kernel == chosen


AMPERE = DeviceKind("cuda", bf16_products=True, capability=(8, 0))
TURING = DeviceKind("cuda", bf16_products=False, capability=(7, 5))


@pytest.mark.parametrize(
    ("kind", "precision", "head_width", "chosen"),
    [
        (AMPERE, "bf16", 128, "varlen"),
        (AMPERE, "fp16", 192, "varlen"),
        (AMPERE, "bf16", 256, "varlen"),
        (AMPERE, "bf16", 200, "one_by_one"),
        (AMPERE, "bf16", 264, "one_by_one"),
        (AMPERE, "bf16", 100, "one_by_one"),
        (AMPERE, "fp32", 128, "one_by_one"),
        (TURING, "fp16", 128, "one_by_one"),
        (GPU, "bf16", 128, "one_by_one"),
        (NEW, "bf16", 128, "one_by_one"),
        (META, "bf16", 128, "one_by_one"),
    ],
)
def test_flash_attention_has_documents_of_short_numbers(
    kind: DeviceKind, precision: str, head_width: int, chosen: DocumentKernel
) -> None:
    kernel = document_kernel(kind, precision=precision, head_width=head_width)
    assert kernel == chosen


def test_only_what_a_cpu_does_not_multiply_is_widened() -> None:
    assert OLD.needs_fp32("bf16")
    assert not OLD.needs_fp32("fp32")
    assert NEW.needs_fp32("fp16")
    assert not any(NEW.needs_fp32(precision) for precision in ("bf16", "fp32"))
    assert not any(
        kind.needs_fp32(precision)
        for kind in (GPU, META)
        for precision in ("fp16", "bf16", "fp32")
    )


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
def test_a_device_says_its_kind(device_type: str) -> None:
    kind = device.kind_of(device_type)
    assert kind.type == device_type
    assert device_type == "cpu" or kind.bf16_products
