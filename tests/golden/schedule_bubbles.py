"""Writes schedule_bubbles.json anew: `python -m tests.golden.schedule_bubbles`.

A change of it is a change of a schedule: look at it.
"""

import json

from megatron_ray.pipeline_parallel.schedules.orders import compute_orders, stage_map
from megatron_ray.pipeline_parallel.schedules.simulation import simulate_computing
from tests.unit.megatron_ray.pipeline_parallel.schedules.test_schedules import (
    GOLDEN,
    LARGE,
    MEDIUM,
    SMALL,
    formula,
    key,
)


def main() -> None:
    bubbles = {}
    for case in [*SMALL, *MEDIUM, *LARGE]:
        if formula(case) is None:
            name, pp, vpp, count = case
            bubbles[key(case)] = round(
                simulate_computing(
                    compute_orders(name, pp, count, vpp), stage_map(name, pp, vpp)
                ).bubble,
                6,
            )
    GOLDEN.write_text(json.dumps(bubbles, indent=0) + "\n")


if __name__ == "__main__":
    main()
