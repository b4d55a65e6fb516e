"""Fixtures of the tests of preparation."""

from pathlib import Path

import pytest

from tests.support.corpus_files import TEXTS, write


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "corpus.jsonl", TEXTS)
