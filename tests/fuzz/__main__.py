"""`make fuzz`: schemathesis sends what /openapi.json allows, and what it does not, to a
service of its own.

Exit code 0 only when every answer is as the document describes it and nothing went wrong
inside.
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
        program = str(Path(sys.executable).parent / "schemathesis")
        options = ["--continue-on-failure", "--no-color", "--max-examples", "30"]
        command = [program, "--config-file", str(CONFIG), "run"]
        command += [f"{service.url}/openapi.json", *options, *sys.argv[1:]]
        variables = {"FUZZ_TOKEN": service.user_token, "FUZZ_JOB": job_id}
        # In the folder, because schemathesis and hypothesis leave files where they run.
        run = subprocess.run(
            command, cwd=folder, env={**os.environ, **variables}, check=False
        )
        log = service.log.read_text()
        if "Traceback" in log:
            sys.stderr.write(log)
            return 1
        return run.returncode


if __name__ == "__main__":
    sys.exit(main())
