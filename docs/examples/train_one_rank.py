"""Trains a tiny GPT on one rank with the library alone: no Ray, no service.

    python docs/examples/train_one_rank.py [FOLDER] [CORPUS]

Data, indices and checkpoints go below FOLDER (default: runs/library). CORPUS is a text
file or a folder of them (default: the sources of Python's standard library).
"""

import sys
from pathlib import Path

from megatron_ray.config.train_config import TrainConfig
from megatron_ray.data.preparation.prepare import prepare
from megatron_ray.distributed.mesh import ParallelMesh
from megatron_ray.reports import Report
from megatron_ray.training.session import TrainingSession


def main(folder: Path, corpus: str = "builtin://python-stdlib", steps: int = 20) -> None:
    """Prepares the data, trains, and prints one line per report."""
    config = TrainConfig.from_mapping(
        {
            "model": {"preset": "gpt-tiny"},
            "data": {"train": [{"path": corpus}]},
            "optimizer": {"lr": 3e-3},
            "training": {"seq_length": 256, "global_batch_size": 8, "steps": steps},
            "storage": {"path": str(folder)},
        }
    )
    data = prepare(config.data, str(folder / "data"), seq_length=256)

    def report(item: Report) -> None:
        sys.stdout.write(f"{item}\n")

    TrainingSession(config, ParallelMesh.single(), data, report=report).run()


if __name__ == "__main__":
    folder, *corpus = sys.argv[1:] or ["runs/library"]
    main(Path(folder), *corpus)
