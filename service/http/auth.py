"""Authenticates the sender of a request and checks the token's scope.

Owns: tokens, scopes, and the scope that each path needs. Must not know: the work of
routes.

Tokens of users and agents are 256 random bits, of which only the SHA-256 is stored. A
job's token is derived from the service's key and the job's id, so it can be sent to the
agent again and again without being stored anywhere.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from service.http.errors import ProblemError
from service.http.tokens import Scope, read_tokens
from service.settings import Settings, SettingsError
from service.store.database import Store
from service.store.schema import TokenRow

FROM_FILE = "tokens file"
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json"})
KEY_BYTES = 32
_OTHER_SCHEMES = ("basic", "digest", "negotiate", "token")
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="megatron-ray"'}


@dataclass(frozen=True)
class Caller:
    """The holder of a token."""

    scope: Scope
    token_id: str
    """Fingerprint that distinguishes callers without revealing the token."""
    job_id: str | None = None
    """Only for tokens of jobs."""


class Authenticator:
    """Checks tokens against fingerprints held in memory; never blocks."""

    def __init__(self, fingerprints: Mapping[str, Scope], key: bytes) -> None:
        self._fingerprints = dict(fingerprints)
        self._key = key

    @classmethod
    def load(cls, store: Store, settings: Settings) -> "Authenticator":
        """Stores the tokens of the tokens file, then reads all tokens and the key.

        Raises SettingsError.
        """
        if settings.tokens_file is not None:
            # Stored before all tokens are read, so that both kinds are treated alike.
            adopt_tokens(store, read_tokens(settings.tokens_file))
        with store.read() as session:
            rows = session.scalars(sa.select(TokenRow)).all()
        fingerprints = {}
        for row in rows:
            fingerprints[row.sha256] = Scope(row.scope)
        return cls(fingerprints, service_key(settings.data_dir))

    def job_token(self, job_id: str) -> str:
        """Returns the token of one job's driver, which is valid for that job only."""
        signature = hmac.new(self._key, job_id.encode(), hashlib.sha256)
        return f"{job_id}.{signature.hexdigest()}"

    def identify(self, token: str) -> Caller | None:
        """Returns the token's holder; None for an unknown token."""
        # Only tokens of jobs contain a dot: `<job id>.<signature>`.
        job_id, dot, _ = token.partition(".")
        if dot and hmac.compare_digest(token.encode(), self.job_token(job_id).encode()):
            return Caller(Scope.JOB, job_id, job_id)
        digest = fingerprint(token)
        caller = None
        # No early exit: the time of the loop must not depend on which token matches.
        for known, scope in self._fingerprints.items():
            if hmac.compare_digest(known, digest):
                caller = Caller(scope, known[:16])
        return caller

    def authorize(self, path: str, authorization: str | None) -> Caller | None:
        """Returns the caller of a path; None for paths that are open to all.

        `authorization` is the header's value. Raises ProblemError (401, 403).
        """
        needed = required_scope(path)
        if needed is None:
            return None
        caller = self._caller_of(authorization)
        if caller.scope is not needed:
            raise ProblemError(
                "forbidden",
                f"{path} needs a token of scope {needed}; this token has scope {caller.scope}",
            )
        # The path is /internal/v1/jobs/<job id>/...
        if needed is Scope.JOB and caller.job_id != path.split("/")[4]:
            raise ProblemError("forbidden", f"this token is valid for {caller.job_id} only")
        return caller

    def _caller_of(self, authorization: str | None) -> Caller:
        if not authorization:
            raise ProblemError(
                "unauthenticated",
                "no token was sent; send the header Authorization: Bearer <token>",
                headers=_CHALLENGE,
            )
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer":
            # Repeated only when it is a scheme: what stands there may be the token itself.
            name = "this scheme"
            if kind.lower() in _OTHER_SCHEMES:
                name = kind
            raise ProblemError(
                "unauthenticated",
                f"{name} is not supported; send the header Authorization: Bearer <token>",
                headers=_CHALLENGE,
            )
        caller = self.identify(token.strip())
        if caller is None:
            raise ProblemError(
                "unauthenticated",
                "invalid token; check that it belongs to this service",
                headers=_CHALLENGE,
            )
        return caller


def required_scope(path: str) -> Scope | None:
    """Returns the scope that a path needs; None when it is open to all.

    An unknown path needs a user's token, so a route added later is closed by default.
    """
    if path in OPEN_PATHS:
        return None
    if path.startswith("/internal/v1/jobs/"):
        return Scope.JOB
    if path.startswith("/internal/"):
        return Scope.AGENT
    return Scope.USER


def fingerprint(token: str) -> str:
    """Returns the part of a token that is stored."""
    return hashlib.sha256(token.encode()).hexdigest()


def adopt_tokens(store: Store, tokens: Mapping[Scope, str]) -> None:
    """Replaces the tokens stored from a tokens file; others stay."""
    with store.write() as session:
        # A token that was removed from the file must become invalid.
        session.execute(sa.delete(TokenRow).where(TokenRow.name == FROM_FILE))
        for scope, token in tokens.items():
            row = TokenRow(sha256=fingerprint(token), scope=scope, name=FROM_FILE)
            row.created_at = time.time()
            session.merge(row)


def has_configured_token(settings: Settings) -> bool:
    """Whether a user token is configured.

    Raises SettingsError for a tokens file that cannot be used.
    """
    if settings.tokens_file is not None:
        return bool(read_tokens(settings.tokens_file))
    # Called before the app is created, so the database is opened separately.
    store = Store.open(settings.url)
    try:
        with store.read() as session:
            user_tokens = sa.select(TokenRow.scope).where(TokenRow.scope == Scope.USER)
            return session.scalars(user_tokens).first() is not None
    finally:
        store.close()


def service_key(data_dir: Path) -> bytes:
    """Returns the key that job tokens are derived from.

    It is 256 random bits in a file of mode 0600, made on first use. Raises SettingsError
    for a file that is too short.
    """
    path = data_dir / "service.key"
    data_dir.mkdir(parents=True, exist_ok=True)
    # O_EXCL: if two services start at once, one creates the key and both read it.
    with contextlib.suppress(FileExistsError):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
    key = path.read_bytes()
    if len(key) < KEY_BYTES:
        raise SettingsError(
            f"{path} is damaged: {len(key)} bytes instead of {KEY_BYTES}; delete it, and "
            "drivers get new tokens"
        )
    return key
