"""The command line, called as from a shell, and the scripted service behind it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.cli import main as main_module
from tests.support.fake_rest_service import JOB, SPEC, FakeService, Run


@pytest.fixture(scope="module")
def running_service() -> Iterator[FakeService]:
    fake = FakeService()
    yield fake
    fake.close()


@pytest.fixture
def service(running_service: FakeService) -> FakeService:
    running_service.routes.clear()
    running_service.requests.clear()
    running_service.routes["GET /v1/jobs/job-abc"] = (200, JOB)
    for listed in ("attempts", "events", "ranks", "metrics", "profiles"):
        running_service.routes[f"GET /v1/jobs/job-abc/{listed}"] = (
            200,
            {"object": "list", "data": [], "has_more": False},
        )
    return running_service


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGATRON_RAY_DATA_DIR", str(tmp_path / "nothing-here"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "spec.yaml").write_text(SPEC)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["megatron-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            main_module.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call
