"""`up` with stand-ins for service and agent (Ray is real), for tests that kill it:
python fake_stack.py DATA_DIR.
"""

import sys
from pathlib import Path

from service.cli.entry import importing

with importing():
    from rich.console import Console

    from service.cli.commands.stack import with_stack
    from service.cli.failure import CommandError
    from service.local_stack.interruption import Interruption
    from service.local_stack.options import StackOptions
    from service.local_stack.record import StackRecord
    from service.local_stack.stack import LocalStack

SERVICE = """
import http.server, json, os, pathlib, subprocess, sys
# a grandchild that nobody waits for
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"status": "ok", "data": []}).encode())
    def log_message(self, *args): pass
port = int(os.environ["MEGATRON_RAY_PORT"])
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
# Renamed into place, as the service does: who polls for the file finds it complete.
port_file = pathlib.Path(os.environ["MEGATRON_RAY_PORT_FILE"])
port_file.with_suffix(".new").write_text(str(server.server_address[1]))
port_file.with_suffix(".new").replace(port_file)
server.serve_forever()
"""
AGENT = """
import os, sys, time
for name in ("MEGATRON_RAY_AGENT_TOKEN", "RAY_AUTH_TOKEN"):
    assert os.environ[name], "tokens come by environment"
    assert os.environ[name] not in " ".join(sys.argv)
time.sleep(600)
"""


def stand_in_options(data_dir: Path) -> StackOptions:
    """Options with the two stand-ins."""
    return StackOptions(
        data_dir,
        num_cpus=2,
        job_grace_s=2.0,
        service_command=(sys.executable, "-c", SERVICE),
        agent_command=(sys.executable, "-c", AGENT),
    )


def _announce(stack: LocalStack, record: StackRecord) -> None:
    Console().print(f"ready {record.url}")
    sys.stdout.flush()
    stack.supervise()


if __name__ == "__main__":
    interruption = Interruption()
    interruption.listen()
    try:
        with_stack(stand_in_options(Path(sys.argv[1])), interruption, Console(), _announce)
    except CommandError as failure:
        raise SystemExit(failure.exit_code) from failure
