"""Creates an output folder that appears complete or not at all.

Must not know: its contents.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ray.checkpoint.directory import CheckpointError
from megatron_ray.storage.errors import StorageError


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, which is renamed to `out` at the end.

    It is deleted after an exception. Raises CheckpointError when `out` is a URI, exists
    already, or cannot be written to.
    """
    if "://" in out:
        raise CheckpointError(
            "write",
            out,
            "a local path is needed; copy the folder to where you want it afterwards",
        )
    final = Path(out).absolute()
    if final.exists():
        raise CheckpointError(
            "write", out, "it is there already; delete it, or choose another name"
        )
    # On the same file system as `out`, so that the rename is atomic.
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError("write", out, error.strerror or error) from error
    try:
        yield partial
        partial.rename(final)
    except StorageError:
        raise
    except OSError as error:
        raise CheckpointError("write", out, error.strerror or error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
