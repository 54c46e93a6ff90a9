"""What tests of several parts share."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where encoded records are kept, for the length of the run."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LST_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus of three minutes of speech and 40,000 text tokens. Read it, don't write."""
    from lst.prepare.demo import DemoConfig, prepare_demo

    return prepare_demo(
        DemoConfig(
            out=tmp_path_factory.mktemp("tiny") / "demo",
            hours=0.05,
            text_tokens=40_000,
            questions=8,
            validation=8,
            pieces=400,
            workers=1,
        )
    )
