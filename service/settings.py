"""Reads the service's settings.

Owns: every setting, its default, and the environment (read here and nowhere else in the
service). Must not know: what the settings are used for.

A test or `up` builds `Settings` directly; a container sets variables.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megatron_ray.config.errors.messages import refusal
from megatron_ray.config.parsing.numbers import whole_number

PREFIX = "MEGATRON_RAY_"


class SettingsError(ValueError):
    """A setting cannot be used; the text names the variable and the remedy."""


class Settings(BaseModel):
    """All settings; a field `data_dir` is read from MEGATRON_RAY_DATA_DIR, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    data_dir: Path = Path("~/.megatron-ray")
    """Folder of the embedded database, the service's key and, by default, the jobs."""
    database_url: str | None = None
    """SQLAlchemy URL. Default: an SQLite file in `data_dir`."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on. Any address but loopback needs a configured token."""
    port: int = Field(default=8470, ge=0, le=65535)
    """Port to listen on; 0 lets the kernel choose."""
    port_file: Path | None = None
    """File to write the port to once requests are answered."""
    tokens_file: Path | None = None
    """JSON `{"user": "...", "agent": "..."}`; the service keeps only their SHA-256."""
    clusters: Annotated[tuple[str, ...], Field(min_length=1)] = ("default",)
    """Cluster names a spec may use; comma-separated in the environment. `name-*` stands for
    all names that begin so: clusters that are made for one job each."""
    images: tuple[str, ...] = ("default",)
    """Runtime names a spec may use; comma-separated in the environment."""
    credentials: tuple[str, ...] = ()
    """Names of mounted secrets a spec may use; comma-separated in the environment."""
    data_prefixes: tuple[str, ...] | None = None
    """Folders and URIs below which specs may read; comma-separated in the environment, `s3://`
    alone for every bucket. Default: the jobs' own folder, and on a stack of `up`
    whatever its user may read."""
    storage_prefixes: tuple[str, ...] | None = None
    """Folders and URIs below which specs may write, and read. Default: likewise."""
    single_user: bool = False
    """Whether the cluster's processes may do no more than the only user, as on a stack of
    `up`; then all places are open to specs by default."""

    # Limits, and times after which something is given up.
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    """Largest request body from a user."""
    max_internal_body_bytes: int = Field(default=32 << 20, ge=1024)
    """Largest request body from an agent or driver."""
    max_streams: int = Field(default=1000, ge=1)
    """Largest number of event streams open at once."""
    check_wait_s: float = Field(default=10.0, ge=0)
    """How long a submission waits for the agent's check of its paths."""
    storage_timeout_s: float = Field(default=5.0, gt=0)
    """How long a request waits for a job's storage."""
    agent_lost_s: float = Field(default=30.0, gt=0)
    """Time without a request after which an agent counts as lost."""
    ping_s: float = Field(default=15.0, gt=0)
    """Time between comments on a silent event stream."""
    max_wait_s: float = Field(default=60.0, gt=0)
    """Longest wait of a long poll."""

    @field_validator(
        "clusters",
        "images",
        "credentials",
        "data_prefixes",
        "storage_prefixes",
        mode="before",
    )
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = []
        for part in value.split(","):
            if part.strip():
                names.append(part.strip())
        return tuple(names)

    @field_validator(
        "port", "max_body_bytes", "max_internal_body_bytes", "max_streams", mode="before"
    )
    @classmethod
    def _read_numbers(cls, value: Any) -> Any:
        number = None
        if isinstance(value, str):
            number = whole_number(value)
        if number is None:
            return value
        return number

    @field_validator("data_prefixes", "storage_prefixes")
    @classmethod
    def _absolute_prefixes(cls, prefixes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for prefix in prefixes or ():
            if not prefix.startswith("/") and "://" not in prefix:
                raise ValueError(f"{prefix} is relative; use absolute paths and URIs")
        return prefixes

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        # Paths made of it are sent to agents and drivers, which run elsewhere.
        return path.expanduser().absolute()

    def has_cluster(self, name: str) -> bool:
        """Whether a spec may name this cluster, and an agent serve it."""
        if name.endswith("*"):
            return False
        for entry in self.clusters:
            if name == entry or (entry.endswith("*") and name.startswith(entry[:-1])):
                return True
        return False

    @property
    def lasting_clusters(self) -> tuple[str, ...]:
        """The clusters that are expected to be there: all that are named one by one."""
        names = []
        for name in self.clusters:
            if not name.endswith("*"):
                names.append(name)
        return tuple(names)

    @property
    def jobs_dir(self) -> Path:
        """Folder of the jobs' files, unless their specs name others."""
        return self.data_dir / "jobs"

    @property
    def url(self) -> str:
        """Database URL, with the default filled in."""
        return self.database_url or f"sqlite:///{self.data_dir / 'service.db'}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Returns the settings of MEGATRON_RAY_* variables; empty ones count as not set.

        `environment` replaces the process's own. Raises SettingsError.
        """
        # An argument, so that tests need not change the process's environment.
        if environment is None:
            environment = os.environ
        values = {}
        for name in cls.model_fields:
            value = environment.get(PREFIX + name.upper())
            # Manifests often set variables to nothing, meaning the default.
            if value:
                values[name] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            messages = []
            for item in error.errors():
                name = str(item["loc"][0])
                # As it was written, and not as it was read.
                value = values.get(name, item["input"])
                messages.append(f"{PREFIX}{name.upper()}: {refusal(item, value)}")
            raise SettingsError("; ".join(messages)) from error
