"""Writes measured figures as people read them.

Owns: units and digits. Pure.
"""

from collections.abc import Mapping
from typing import Any


def flops_text(flops: float) -> str:
    """Returns floating-point operations per second with their unit."""
    if flops >= 1e12:
        return f"{_digits(flops / 1e12)} TFLOP/s"
    return f"{_digits(flops / 1e9)} GFLOP/s"


def rate_text(bytes_per_s: float) -> str:
    """Returns bytes per second with their unit."""
    return f"{_digits(bytes_per_s / 1e9)} GB/s"


def describe_speed(data: Mapping[str, Any]) -> str:
    """Returns a SpeedReport, as JSON, in one line."""
    rate = data["bytes_per_s"]
    if data["part"] == "device":
        text = f"measured matmul {flops_text(data['flops'])}, memory {rate_text(rate)}"
        if data["problem"] is not None:
            text = f"{text}; {data['problem']}"
        return text
    what = "all-reduce of all ranks"
    if data["part"] == "node":
        what = "all-reduce in the node"
    elif data["part"] == "link":
        what = f"messages to and from rank {data['peer']}"
    if rate is None:
        return f"{what}: {data['problem']}"
    return f"measured {what}: {rate_text(rate)}"


def _digits(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"
