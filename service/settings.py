"""What the service is told from outside.

Owns: every setting, its default, and the environment (read here and nowhere else).

Must not know: what the settings are used for. A test or `up` builds `Settings`
directly; a container sets variables.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

PREFIX = "MEGATRON_RAY_"


class SettingsError(ValueError):
    """A setting that cannot be used; the text names the variable and the remedy."""


class Settings(BaseModel):
    """All settings; a field `data_dir` is read from MEGATRON_RAY_DATA_DIR, and so on."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    data_dir: Path = Path("~/.megatron-ray")
    """Folder of the embedded database, the service's key and, unless a spec says
    otherwise, the jobs."""
    database_url: str | None = None
    """SQLAlchemy URL; an SQLite file in `data_dir` when not given."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; anything but loopback needs a configured token."""
    port: int = Field(default=8470, ge=0, le=65535)
    """Port to listen on; 0 lets the kernel choose."""
    port_file: Path | None = None
    """Where to write the port once requests are answered."""
    tokens_file: Path | None = None
    """JSON `{"user": "...", "agent": "..."}`; the service keeps only their SHA-256."""
    clusters: Annotated[tuple[str, ...], Field(min_length=1)] = ("default",)
    """Cluster names a spec may use; comma-separated in the environment."""
    images: tuple[str, ...] = ("default",)
    """Runtime names a spec may use; comma-separated in the environment."""
    credentials: tuple[str, ...] = ()
    """Names of mounted secrets a spec may use; comma-separated in the environment."""

    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    """Largest request body from a user."""
    max_internal_body_bytes: int = Field(default=32 << 20, ge=1024)
    """Largest request body from an agent or driver."""
    max_streams: int = Field(default=1000, ge=1)
    """Event streams open at once."""
    check_wait_s: float = Field(default=10.0, ge=0)
    """How long a submission waits for the agent's look at its paths."""
    agent_lost_s: float = Field(default=30.0, gt=0)
    """Silence after which an agent counts as gone."""
    ping_s: float = Field(default=15.0, gt=0)
    """Time between comments on a silent event stream."""
    max_wait_s: float = Field(default=60.0, gt=0)
    """Longest that a long poll may ask to wait."""

    @field_validator("clusters", "images", "credentials", mode="before")
    @classmethod
    def _split_names(cls, given: Any) -> Any:
        return (
            tuple(name.strip() for name in given.split(",") if name.strip())
            if isinstance(given, str)
            else given
        )

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, given: Path) -> Path:
        return given.expanduser().absolute()

    @property
    def url(self) -> str:
        """Database URL, resolved."""
        return self.database_url or f"sqlite:///{self.data_dir / 'service.db'}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Settings from MEGATRON_RAY_* variables; empty ones count as not given.

        Raises SettingsError.
        """
        given = os.environ if environment is None else environment
        values = {
            name: given[PREFIX + name.upper()]
            for name in cls.model_fields
            if given.get(PREFIX + name.upper())
        }
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            wrong = "; ".join(
                f"{PREFIX}{str(item['loc'][0]).upper()}: {item['msg']}"
                for item in error.errors()
            )
            raise SettingsError(wrong) from error
