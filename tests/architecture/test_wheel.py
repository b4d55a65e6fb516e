"""What is shipped: exactly the three packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_holds_exactly_the_three_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        assert "Private :: Do Not Upload" in archive.read(metadata).decode()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "service",
        "workers",
        "megatron_ray",
    }
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for package in ("service", "workers", "megatron_ray")
        for path in (ROOT / package).rglob("*.py")
    }
    assert in_tree <= set(names), "every source file is in the wheel"
