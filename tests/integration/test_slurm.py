"""The batch script of deploy/slurm, with an srun that starts its processes on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.standalone_job import write_job

pytestmark = pytest.mark.parallel

SCRIPT = Path(__file__).parents[2] / "deploy/slurm/train.sbatch"
# Two nodes with a task each. After some steps both tasks get the signal that the script
# asks Slurm for.
SRUN = """#!{python}
import os, signal, socket, subprocess, sys, time
from pathlib import Path

command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
tasks = []
for rank in range(2):
    environ = {{
        **os.environ, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "MASTER_PORT": str(port),
        "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    }}
    tasks.append(subprocess.Popen(command, env=environ))
steps = Path("reports.jsonl")
while "SIGNAL" in os.environ and tasks[0].poll() is None:
    if steps.exists() and steps.read_text().count('"step"') > 8:
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        break
    time.sleep(0.02)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
ENDING = "#!/bin/sh\nexit $ENDING\n"
SCONTROL = '#!/bin/sh\necho "$@" >> requests\n'


def write_program(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run_script(
    folder: Path, *arguments: str, **environ: str
) -> "subprocess.CompletedProcess[str]":
    """Runs the batch script as Slurm does on the first node of the job."""
    search_path = f"{folder / 'bin'}:{os.environ['PATH']}"
    shell = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        cwd=folder,
        env={**os.environ, **shell, "PATH": search_path, "PYTHON": sys.executable}
        | environ,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


@pytest.mark.parametrize("status", [0, 1, 2, 75, 138, 143])
def test_a_run_that_is_not_done_is_queued_again(tmp_path: Path, status: int) -> None:
    write_program(tmp_path, "srun", ENDING)
    write_program(tmp_path, "scontrol", SCONTROL)
    done = run_script(tmp_path, "job.yaml", ENDING=str(status))
    if status in (75, 138, 143):
        assert (tmp_path / "requests").read_text() == "requeue 7\n"
        assert done.returncode == 0
    else:
        assert not (tmp_path / "requests").exists()
        assert done.returncode == status


def test_slurm_is_asked_for_a_signal_that_ranks_handle_and_for_a_requeue() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    # Without `B:` it is sent to the ranks and not to the script.
    assert "--signal=USR1@300" in options
    assert "--requeue" in options
    assert "--open-mode=append" in options


def test_a_signal_before_the_time_limit_ends_in_a_checkpoint_from_which_the_next_job_goes_on(
    tmp_path: Path,
) -> None:
    write_job(tmp_path)
    write_program(tmp_path, "srun", SRUN.format(python=sys.executable))
    write_program(tmp_path, "scontrol", SCONTROL)
    overrides = ("parallel.tp=2", "training.steps=500", "schedule.kind=constant")
    arguments = ["job.yaml", "--reports", "reports.jsonl"]
    for override in overrides:
        arguments += ["--set", override]
    first = run_script(tmp_path, *arguments, SIGNAL="yes")
    assert first.returncode == 0, first.stderr
    match = re.search(r"stopped after step (\d+) by SIGUSR1; newest", first.stdout)
    assert match is not None, first.stdout
    assert (tmp_path / "requests").read_text() == "requeue 7\n"
    last = int(match[1]) + 2
    second = run_script(tmp_path, *arguments, "--set", f"training.steps={last}")
    assert second.returncode == 0, second.stderr
    assert f"step-{last:08d}-a0002" in second.stdout
    assert (tmp_path / "requests").read_text() == "requeue 7\n"
