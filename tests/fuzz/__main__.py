"""`make fuzz`: schemathesis sends what /openapi.json allows, and what it does not, to a
service of its own; exit code 0 only when every answer is as the document describes it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.finished_job import add_finished_job
from tests.support.service_process import ServiceProcess

CONFIG = Path(__file__).parent / "schemathesis.toml"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder, ServiceProcess(Path(folder)) as service:
        job_id = add_finished_job(
            service.client(service.user_token),
            service.client(service.agent_token),
            service.client,
        )
        command = [Path(sys.executable).parent / "schemathesis"]
        command += ["--config-file", CONFIG, "run", f"{service.url}/openapi.json"]
        command += ["--continue-on-failure", "--no-color", "--max-examples", "30"]
        variables = {"FUZZ_TOKEN": service.user_token, "FUZZ_JOB": job_id}
        # The folder of the run, because schemathesis and hypothesis leave files there.
        return subprocess.run(
            [*map(str, command), *sys.argv[1:]],
            cwd=folder,
            env={**os.environ, **variables},
            check=False,
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
