"""Everything a plan shows, for 16,384 ranks, in a process that has neither torch nor
Ray.
"""

import subprocess
import sys

import pytest

from megatron_ray.pipeline_parallel.schedules.actions import Op
from megatron_ray.pipeline_parallel.schedules.layout import StageContents
from megatron_ray.pipeline_parallel.schedules.orders import (
    ScheduleName,
    compute_orders,
    stage_map,
)
from megatron_ray.pipeline_parallel.schedules.plan import PipelinePlan
from megatron_ray.pipeline_parallel.schedules.simulation import Costs, simulate_computing
from megatron_ray.planning.pipeline import bubble, kept_and_released

_PLAN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "ray"):
            raise ImportError(name + " is blocked in this test")
sys.meta_path.insert(0, Blocked())
import time
from megatron_ray.config.train_config import TrainConfig
from megatron_ray.planning.hardware import HARDWARE
from megatron_ray.planning.answers.estimates import check_memory, estimates, rank_map
config = TrainConfig.from_mapping({
    "model": {"preset": "llama3-405b"},
    "parallel": {
        "tp": 8, "cp": 2, "pp": 16, "vpp": 4, "dp": 64,
        "sequence_parallel": True, "layout": "Et|(tt|)*62tL",
    },
    "data": {"train": [{"path": "unused"}]},
    "training": {
        "seq_length": 8192, "micro_batch_size": 1, "global_batch_size": 2048,
        "steps": 10, "precision": "bf16",
    },
    "optimizer": {"lr": 8e-5},
})
start = time.process_time()
found = estimates(config, HARDWARE["H100"])
ranks = rank_map(config)
problems = check_memory(config, HARDWARE["H100"])
seconds = time.process_time() - start
print(seconds, len(ranks), found.time.mfu, len(found.communication.bytes), len(problems))
"""


def test_a_plan_for_16384_ranks_takes_less_than_a_second_without_torch_or_ray() -> None:
    done = subprocess.run([sys.executable, "-c", _PLAN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, ranks, mfu, ways, problems = map(float, done.stdout.split())
    assert seconds < 1
    assert (ranks, problems) == (16384, 0)
    assert 0.2 < mfu < 0.7
    assert ways >= 8


@pytest.mark.parametrize(
    ("schedule", "pp", "vpp"),
    [
        ("gpipe", 4, 1),
        ("1f1b", 4, 1),
        ("interleaved", 4, 2),
        ("interleaved", 3, 3),
        ("zb-h1", 4, 1),
        ("zb-v", 4, 2),
    ],
)
@pytest.mark.parametrize("extra", [0, 1, 3])
def test_a_short_step_stands_for_a_long_one(
    schedule: ScheduleName, pp: int, vpp: int, extra: int
) -> None:
    count = 6 * pp + extra
    stages = stage_map(schedule, pp, vpp)
    plan = PipelinePlan(schedule, stages, (StageContents(),) * stages.num_stages)
    orders = compute_orders(schedule, pp, count, vpp)
    costs = Costs(1.0, 1.3, 0.9)
    whole = simulate_computing(orders, stages, costs)
    assert bubble(plan, count, costs) == pytest.approx(whole.bubble)
    for rank, order in enumerate(orders):
        in_flight = [0]
        for event in kept_and_released(plan, count, rank):
            in_flight.append(in_flight[-1] + (1 if event > 0 else -1))
        assert max(in_flight) == whole.peak_activations[rank]
        assert in_flight[-1] == 0
        assert any(action.op is Op.FORWARD for action in order)
