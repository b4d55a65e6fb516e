"""Becomes a container: prepares its file system, then executes its command.

    python -I enter_container.py DESCRIPTION.json

Runs in a mount namespace of its own. The description has the fields of
`sandbox.ContainerProcess`. Uses the standard library only, because the image's packages
are not the ones of this interpreter.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY = 0x1
_MS_REMOUNT = 0x20
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_MNT_DETACH = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 0x1
_SYS_MOUNT_SETATTR = 442  # the same on all architectures
_PR_SET_NO_NEW_PRIVS = 38


def main(description: Path) -> None:
    """Executes the container that a file describes."""
    container: dict[str, Any] = json.loads(description.read_text())
    unshare = shutil.which("unshare")
    assert unshare is not None
    enter_root(container)
    if not container["allow_privilege_escalation"]:
        _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    os.nice(container["niceness"])
    # The pod's user, who owns here what the caller owns outside, and has no capability.
    user = container["user"]
    words = [unshare, "--user", f"--map-user={user}", f"--map-group={user}", "--"]
    os.execve(unshare, [*words, *container["command"]], container["environment"])


def enter_root(container: dict[str, Any]) -> None:
    """Makes a root of the machine's own files and the container's mounts."""
    root = Path(container["root"])
    mounts: list[dict[str, Any]] = sorted(
        container["mounts"], key=lambda mount: len(mount["target"])
    )
    targets = [Path(mount["target"]) for mount in mounts]
    mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", 0)
    mirror(Path("/"), root, targets)
    for item in mounts:
        # Those below another mount are made once that one is there.
        if not any(target in Path(item["target"]).parents for target in targets):
            make_mount_point(item, root)
    if container["read_only_root"]:
        set_read_only(root)
    for item in mounts:
        make_mount_point(item, root)
        target = root / item["target"].lstrip("/")
        mount(item["source"], target, None, _MS_BIND | _MS_REC)
        if item["read_only"]:
            set_read_only(target)
    mount("proc", root / "proc", "proc", 0)
    os.chdir(root)
    _check(_LIBC.pivot_root(b".", b"."))
    _check(_LIBC.umount2(b".", _MNT_DETACH))
    os.chdir(container["working_directory"])


def mirror(folder: Path, root: Path, targets: list[Path]) -> None:
    """Shows a folder of the machine below `root`.

    A folder that mount points are made in is made anew, with everything in it bound.
    """
    copy = root / folder.relative_to("/")
    for entry in sorted(folder.iterdir()):
        if entry in targets or entry == Path("/proc"):
            continue
        place = copy / entry.name
        if entry.is_symlink():
            place.symlink_to(entry.readlink())
        elif entry.is_dir():
            place.mkdir()
            if any(entry in target.parents for target in targets):
                mirror(entry, root, targets)
            else:
                mount(str(entry), place, None, _MS_BIND | _MS_REC)
        elif entry.exists():
            place.touch()
            mount(str(entry), place, None, _MS_BIND)
    if folder == Path("/"):
        (root / "proc").mkdir()


def make_mount_point(item: dict[str, Any], root: Path) -> None:
    """Makes the folder or file that is mounted over, if it is missing."""
    place = root / item["target"].lstrip("/")
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if Path(item["source"]).is_dir():
        place.mkdir()
    else:
        place.touch()


def mount(source: str | None, target: str | Path, kind: str | None, flags: int) -> None:
    """Calls mount(2). Raises OSError."""
    words = [_bytes(source), _bytes(str(target)), _bytes(kind)]
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), None), str(target))


def set_read_only(target: Path) -> None:
    """Makes a mount and those below it read-only."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    result = _LIBC.syscall(
        _SYS_MOUNT_SETATTR,
        _AT_FDCWD,
        _bytes(str(target)),
        _AT_RECURSIVE,
        attributes,
        ctypes.sizeof(attributes),
    )
    _check(result, str(target))


def _bytes(text: str | None) -> bytes | None:
    if text is None:
        return None
    return os.fsencode(text)


def _check(result: int, place: str = "") -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
