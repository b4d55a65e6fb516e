"""Who is calling.

Owns: tokens, scopes, which scope an address needs. Must not know: what the routes do.

Tokens of users and agents are 256 random bits of which only the SHA-256 is kept. A
job's token is derived from the service's key and the job's id, so it can be told to the
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
from service.http.tokens import Scope, new_token, read_tokens
from service.settings import Settings, SettingsError
from service.store.database import Store
from service.store.schema import TokenRow

FROM_FILE = "tokens file"
OPEN_ADDRESSES = frozenset({"/healthz", "/readyz", "/openapi.json"})
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="megatron-ray"'}


@dataclass(frozen=True)
class Caller:
    """Who holds a token."""

    scope: Scope
    token_id: str
    """Tells callers apart; says nothing about the token."""
    job_id: str | None = None


class Authenticator:
    """Knows every token's fingerprint; asking it never blocks."""

    def __init__(self, fingerprints: Mapping[str, Scope], key: bytes) -> None:
        self._fingerprints = dict(fingerprints)
        self._key = key

    @classmethod
    def load(cls, store: Store, settings: Settings) -> "Authenticator":
        """Takes over the tokens file, then reads all tokens and the key.

        Raises SettingsError.
        """
        if settings.tokens_file is not None:
            adopt_tokens(store, read_tokens(settings.tokens_file))
        with store.read() as session:
            rows = session.execute(sa.select(TokenRow.sha256, TokenRow.scope)).all()
        return cls(
            {sha256: Scope(scope) for sha256, scope in rows}, service_key(settings.data_dir)
        )

    def job_token(self, job_id: str) -> str:
        """The token with which a job's driver speaks for that job, and for nothing
        else.
        """
        return (
            f"{job_id}.{hmac.new(self._key, job_id.encode(), hashlib.sha256).hexdigest()}"
        )

    def identify(self, token: str) -> Caller | None:
        """The token's holder; None for a token nobody has given out."""
        job_id, dot, _ = token.partition(".")
        if dot and hmac.compare_digest(token.encode(), self.job_token(job_id).encode()):
            return Caller(Scope.JOB, job_id, job_id)
        given = fingerprint(token)
        found = None
        for (
            known,
            scope,
        ) in self._fingerprints.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, given):
                found = Caller(scope, known[:16])
        return found

    def authorize(self, path: str, authorization: str | None) -> Caller | None:
        """Who calls an address; None for addresses open to all.

        Raises ProblemError (401, 403).
        """
        needed = required_scope(path)
        if needed is None:
            return None
        kind, _, token = (authorization or "").partition(" ")
        if not authorization:
            raise ProblemError(
                "unauthenticated",
                "no token was sent; send the header Authorization: Bearer <token>",
                headers=_CHALLENGE,
            )
        caller = self.identify(token.strip()) if kind.lower() == "bearer" else None
        if caller is None:
            raise ProblemError(
                "unauthenticated",
                "the token is not known here; check that it belongs to this service",
                headers=_CHALLENGE,
            )
        if caller.scope is not needed:
            raise ProblemError(
                "forbidden",
                f"this is a token for scope {caller.scope}; {path} needs one for scope {needed}",
            )
        if needed is Scope.JOB and caller.job_id != path.split("/")[4]:
            raise ProblemError("forbidden", f"this token speaks for {caller.job_id} only")
        return caller


def required_scope(path: str) -> Scope | None:
    """Which scope an address needs; a user's token unless said otherwise, so a
    forgotten address is closed.
    """
    if path in OPEN_ADDRESSES:
        return None
    if path.startswith("/internal/v1/jobs/"):
        return Scope.JOB
    return Scope.AGENT if path.startswith("/internal/") else Scope.USER


def fingerprint(token: str) -> str:
    """What is stored of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def create_token(store: Store, scope: Scope, name: str) -> str:
    """Makes a token, stores its fingerprint and returns the token, which cannot be had
    again; known after the next start.
    """
    token = new_token()
    with store.write() as session:
        session.add(
            TokenRow(
                sha256=fingerprint(token), scope=scope, name=name, created_at=time.time()
            )
        )
    return token


def adopt_tokens(store: Store, tokens: Mapping[Scope, str]) -> None:
    """Makes a tokens file's tokens the ones from a file: earlier ones are gone, tokens
    made otherwise stay.
    """
    with store.write() as session:
        session.execute(sa.delete(TokenRow).where(TokenRow.name == FROM_FILE))
        for scope, token in tokens.items():
            session.merge(
                TokenRow(
                    sha256=fingerprint(token),
                    scope=scope,
                    name=FROM_FILE,
                    created_at=time.time(),
                )
            )


def has_configured_token(settings: Settings) -> bool:
    """Whether anybody could get in.

    Raises SettingsError for a tokens file that cannot be used.
    """
    if settings.tokens_file is not None:
        return bool(read_tokens(settings.tokens_file))
    store = Store.open(settings.url)
    try:
        with store.read() as session:
            return (
                session.scalars(
                    sa.select(TokenRow.scope).where(TokenRow.scope == Scope.USER)
                ).first()
                is not None
            )
    finally:
        store.close()


def service_key(data_dir: Path) -> bytes:
    """The key job tokens are derived from: 256 random bits in a file of mode 0600, made
    on first use.
    """
    path = data_dir / "service.key"
    data_dir.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
    ):
        file.write(secrets.token_bytes(32))
    key = path.read_bytes()
    if len(key) < 32:
        raise SettingsError(
            f"{path} is damaged: {len(key)} bytes instead of 32; delete it, drivers are "
            "then told new tokens"
        )
    return key
