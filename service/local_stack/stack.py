"""A local stack while it lives.

Owns: starting Ray, service and agent, in the order that can always be undone, and
supervising them.

Whoever starts it holds the data dir's lock. Signals only set a flag (`Interruption`);
every wait looks at it, so that no exception ever interrupts a clean-up. Must not know:
terminals, torch, ray.
"""

import fcntl
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import httpx

from service.client import Client
from service.http.tokens import Scope, read_or_create_tokens
from service.local_stack.backoff import Restart, after_end
from service.local_stack.interruption import Interruption, StackError, StartInterruptedError
from service.local_stack.ray_head import (
    MAX_TEMP_DIR_LENGTH,
    PORT_NAMES,
    available_cpus,
    free_ports,
    head_command,
    is_free,
    ray_environment,
)
from service.local_stack.record import (
    LOCK_NAME,
    TEMP_PREFIX,
    StackRecord,
    boot_id,
    pid_namespace,
    read_record,
    write_record,
)
from service.local_stack.sessions import GatedProcess, kill_sessions, read_process
from service.local_stack.teardown import TeardownReport, end_recorded
from service.settings import SettingsError

Say = Callable[[str], None]
Name = Literal["ray", "service", "agent"]

_POLL_S = 0.1
_LOOK_S = 0.03  # between looks that cost nothing
_RAY_TRIES = 3  # a port found free may be taken before Ray binds it
_RAY_START_S = 90.0
# it has no sign of its own that it works, and importing Ray alone may take this long
_AGENT_SETTLES_S = 10.0
_LOG_TAIL_LINES = 20
_LAST_PORT = "service.port"


@dataclass(frozen=True)
class StackOptions:
    """What `up` was asked for.

    The command lines are fields so that tests can put stand-ins.
    """

    data_dir: Path
    num_cpus: int | None = None
    """CPUs that Ray hands out; those of the machine, and at least 2, when None."""
    ready_timeout_s: float = 120.0
    job_grace_s: float = 20.0
    """How long jobs may take to end before their processes are killed."""
    service_command: tuple[str, ...] = (sys.executable, "-m", "service.main")
    agent_command: tuple[str, ...] = (sys.executable, "-m", "workers.agent")


@dataclass
class _Child:
    """One supervised process."""

    gated: GatedProcess
    started: float
    crashes: int = 0
    ready_at: float | None = None
    restart_at: float | None = None

    def has_ended(self) -> bool:
        return self.gated.process.poll() is not None

    def after_end(self, now: float) -> Restart:
        return after_end(
            self.crashes,
            now - self.started,
            None if self.ready_at is None else now - self.ready_at,
        )


@dataclass
class LocalStack:
    """One Ray head, one service, one agent.

    `start`, then `supervise`, and `end` whatever happened.
    """

    options: StackOptions
    say: Say
    interruption: Interruption
    progress: Say = lambda text: None
    record: StackRecord | None = None
    _children: dict[Name, _Child] = field(default_factory=dict)
    _lock: IO[str] | None = None

    # ---- start

    def start(self) -> StackRecord:
        """Returns once agent and Ray are there.

        Raises StackError, StartInterruptedError; call `end` after either.
        """
        data_dir = self.options.data_dir
        self._take_lock(data_dir)
        left = read_record(data_dir)
        if left is not None:
            self.say("cleaning up after a stack that was not ended")
            end_recorded(left, self.say, job_grace_s=0)
        self._keep(self._new_record(data_dir))
        Path(self._known.temp_dir).mkdir(mode=0o700)
        self._rotate_logs()
        self._keep(
            self._known.model_copy(
                update={
                    "token": self._tokens()[Scope.USER],
                    "ray_token": secrets.token_hex(32),
                }
            )
        )

        self.progress("starting Ray and the service")
        self._start_service(port=self._last_port())
        self._start_ray()
        self._wait_for_service()
        self._start_agent()
        self._wait_until_ready()
        self._keep(self._known.model_copy(update={"phase": "ready"}))
        return self._known

    def _take_lock(self, data_dir: Path) -> None:
        try:
            data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (data_dir / LOCK_NAME).open("w")
        except OSError as error:
            raise StackError(
                f"cannot write to the data dir {data_dir}: {error.strerror}; name another "
                "with --data-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            self._lock = None
            running = read_record(data_dir)
            where = (
                f"at {running.url} (pid {running.up_pid})"
                if running and running.url
                else "and starting"
            )
            message = (
                f"a stack with data dir {data_dir} is already up {where}; end it with "
                f"`megatron-ray down --data-dir {data_dir}`"
            )
            raise StackError(f"{message}, or name another with --data-dir") from error

    def _new_record(self, data_dir: Path) -> StackRecord:
        me = read_process(os.getpid())
        if me is None:
            raise StackError("the local stack needs Linux: there is no /proc here")
        stack_id = secrets.token_hex(8)
        root = Path("/tmp")
        if not os.access(root, os.W_OK):
            root = Path(tempfile.gettempdir())
        temp_dir = root / f"{TEMP_PREFIX}{stack_id}"
        if len(str(temp_dir)) > MAX_TEMP_DIR_LENGTH:
            raise StackError(
                f"temp dir {temp_dir} is too long for Ray's sockets; make /tmp writable or "
                "set TMPDIR to a short path"
            )
        return StackRecord(
            stack_id=stack_id,
            boot_id=boot_id(),
            pid_namespace=pid_namespace(),
            up_pid=me.pid,
            up_start_ticks=me.start_ticks,
            temp_dir=str(temp_dir),
            data_dir=str(data_dir),
        )

    @property
    def _known(self) -> StackRecord:
        assert self.record is not None, "start() makes the record first"
        return self.record

    def _keep(self, record: StackRecord) -> None:
        write_record(record)
        self.record = record

    # ---- the three processes

    def _launch(
        self, name: Name, command: list[str], environment: Mapping[str, str | None]
    ) -> None:
        """At the gate, recorded, released: in this order a kill at any moment leaves
        nothing that `down` does not know.
        """
        self._check_interrupted()
        crashes = self._children[name].crashes if name in self._children else 0
        gated = GatedProcess(command, log=self._log(name))
        try:
            self._keep(self._known.with_session(name, gated.session))
        except OSError:
            gated.abandon()
            raise
        gated.release(environment)
        self._children[name] = _Child(gated, started=time.monotonic(), crashes=crashes)

    def _last_port(self) -> int:
        """The port this data dir's service had before, if it is free, so that addresses
        stay good; else 0, the kernel's choice.
        """
        try:
            port = int((self.options.data_dir / _LAST_PORT).read_text())
        except (OSError, ValueError):
            return 0
        return port if is_free(port) else 0

    def _start_service(self, port: int) -> None:
        self._port_file.unlink(missing_ok=True)
        environment = {
            "MEGATRON_RAY_DATA_DIR": str(self.options.data_dir),
            "MEGATRON_RAY_HOST": "127.0.0.1",
            "MEGATRON_RAY_PORT": str(port),
            "MEGATRON_RAY_PORT_FILE": str(self._port_file),
            "MEGATRON_RAY_TOKENS_FILE": str(self._tokens_file),
        }
        self._launch("service", list(self.options.service_command), environment)

    def _start_ray(self) -> None:
        for attempt in range(1, _RAY_TRIES + 1):
            ports = free_ports(PORT_NAMES)
            dashboard = f"http://127.0.0.1:{ports['ray_dashboard']}"
            update = {
                "ports": {**self._known.ports, **ports},
                "ray_address": f"127.0.0.1:{ports['ray_gcs']}",
                "dashboard_url": dashboard,
            }
            self._keep(self._known.model_copy(update=update))
            ray_dir = (
                Path(self._known.temp_dir) / str(attempt)
                if attempt > 1
                else Path(self._known.temp_dir) / "ray"
            )
            self._launch(
                "ray",
                head_command(ports, ray_dir, self.options.num_cpus or available_cpus()),
                self._ray_environment(),
            )
            if self._wait_for_ray(dashboard):
                return
            self._kill("ray")
        raise StackError("Ray did not start", self.log_tail("ray"))

    def _wait_for_ray(self, dashboard: str) -> bool:
        deadline = time.monotonic() + _RAY_START_S
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                self._pause()
                if self._children["ray"].has_ended():
                    return False
                try:
                    if client.get(f"{dashboard}/api/gcs_healthz").status_code == 200:
                        self._children["ray"].ready_at = time.monotonic()
                        return True
                except httpx.HTTPError:
                    pass  # not listening yet
        return False

    def _wait_for_service(self) -> None:
        deadline = time.monotonic() + self.options.ready_timeout_s
        while not self._port_file.exists():
            self._pause(_LOOK_S)
            if self._children["service"].has_ended():
                raise StackError(
                    "the service ended while starting", self.log_tail("service")
                )
            if time.monotonic() > deadline:
                self._kill("service")
                raise StackError(
                    "the service did not start in time", self.log_tail("service")
                )
        self._children["service"].ready_at = time.monotonic()
        port = int(self._port_file.read_text())
        (self.options.data_dir / _LAST_PORT).write_text(f"{port}\n")
        ports = {**self._known.ports, "service": port}
        self._keep(
            self._known.model_copy(
                update={"url": f"http://127.0.0.1:{port}", "ports": ports}
            )
        )

    def _start_agent(self) -> None:
        known = self._known
        command = [
            *self.options.agent_command,
            "--service",
            known.url,
            "--address",
            known.ray_address,
            "--cluster",
            "default",
        ]
        secret = {
            "MEGATRON_RAY_AGENT_TOKEN": self._tokens()[Scope.AGENT],
            "MEGATRON_RAY_AGENT_TOKEN_FILE": None,
        }
        environment: dict[str, str | None] = {**self._ray_environment(), **secret}
        self._launch("agent", command, environment)
        self._children["agent"].ready_at = time.monotonic() + _AGENT_SETTLES_S

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.options.ready_timeout_s
        with Client(self._known.url, self._known.token) as client:
            while True:
                ready, state = client.ready()
                if ready:
                    return
                self.progress(f"almost there{_waiting_for(state)}")
                self._pause()
                for name, child in self._children.items():
                    if child.has_ended():
                        raise StackError(
                            f"{_LABELS[name]} ended while starting", self.log_tail(name)
                        )
                if time.monotonic() > deadline:
                    waited = self.options.ready_timeout_s
                    text = f"not ready after {waited:.0f} s{_waiting_for(state)}"
                    raise StackError(text, self.log_tail("agent"))

    # ---- while it lives

    def supervise(self, until: Callable[[], bool] = lambda: False) -> None:
        """Restarts what ends, with back-off, until `until()` or a signal."""
        while not until() and not self.interruption.asked:
            time.sleep(_LOOK_S)
            for name in list(self._children):
                try:
                    self._look_after(name)
                except StartInterruptedError:
                    return
                except StackError as error:
                    self.say(f"{error}; trying again\n{error.log_tail}")

    def _look_after(self, name: Name) -> None:
        child = self._children[name]
        now = time.monotonic()
        if not child.has_ended():
            return
        if child.restart_at is None:
            restart = child.after_end(now)
            child.crashes = restart.crashes
            child.restart_at = now + restart.wait_s
            code = child.gated.process.returncode
            self.say(
                f"{_LABELS[name]} ended ({_ending(code)}); restarting"
                + (f" in {restart.wait_s:.0f} s" if restart.wait_s >= 1 else "")
            )
        if now >= child.restart_at:
            child.restart_at = None
            self._restart(name)

    def _kill(self, name: Name) -> None:
        gated = self._children[name].gated
        kill_sessions([gated.session])
        gated.process.wait()

    def _restart(self, name: Name) -> None:
        self._kill(name)
        if name == "agent":
            self._start_agent()
        elif name == "ray":
            self._start_ray()
            self._restart_agent()  # the address is a new one
        else:
            self._restart_service()

    def _restart_agent(self) -> None:
        self._restart("agent")
        self.say("the agent is started again")

    def _restart_service(self) -> None:
        old_url = self._known.url
        self._start_service(self._last_port())
        self._wait_for_service()
        if self._known.url != old_url:
            self.say(f"the service is now at {self._known.url}")
            self._restart_agent()

    # ---- end

    def end(self) -> TeardownReport:
        """Ends everything this object started; harmless when nothing was."""
        try:
            if self.record is None:
                return TeardownReport(was_up=False)
            record = self.record
            self.record = None
            report = end_recorded(
                record,
                self.say,
                self.options.job_grace_s,
                hurry=lambda: self.interruption.urgent,
            )
            for child in self._children.values():
                child.gated.process.wait()
            return report
        finally:
            if self._lock is not None:
                self._lock.close()

    # ---- small things

    def _check_interrupted(self) -> None:
        if self.interruption.asked:
            raise StartInterruptedError

    def _pause(self, seconds: float = _POLL_S) -> None:
        self._check_interrupted()
        time.sleep(seconds)

    def _ray_environment(self) -> dict[str, str | None]:
        return ray_environment(self._known.ray_token, Path(self._known.temp_dir))

    @property
    def _tokens_file(self) -> Path:
        return self.options.data_dir / "tokens.json"

    def _tokens(self) -> dict[Scope, str]:
        try:
            return read_or_create_tokens(self._tokens_file)
        except SettingsError as error:
            raise StackError(str(error)) from error

    @property
    def _port_file(self) -> Path:
        return Path(self._known.temp_dir) / "service.port"

    def _log(self, name: Name) -> Path:
        return self.options.data_dir / "logs" / f"{name}.log"

    def _rotate_logs(self) -> None:
        (self.options.data_dir / "logs").mkdir(exist_ok=True)
        for name in _LABELS:
            if self._log(name).exists():
                self._log(name).replace(self._log(name).with_suffix(".previous.log"))

    def log_tail(self, name: Name) -> str:
        """The last lines that a process wrote, under the name of its log file."""
        try:
            lines = (
                self._log(name).read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
            )
        except FileNotFoundError:
            lines = []
        return "\n".join([f"--- {self._log(name)}", *lines])


_LABELS: dict[Name, str] = {"ray": "Ray", "service": "the service", "agent": "the agent"}


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {-code}"


def _waiting_for(state: Mapping[str, Any]) -> str:
    """What /readyz still misses, in words."""
    if state.get("status") == "unavailable":
        return ": the database does not answer"
    live = any(agent.get("live") for agent in state.get("agents") or ())
    return (
        ": the agent has spoken but sees no Ray node yet"
        if live
        else ": the agent has not spoken yet"
    )
