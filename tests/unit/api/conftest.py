"""Servers for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import write_base, write_family
from serving import CONFIG, Serving, start_serving, write_talker

from moa_serve.api import adapters, folders


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base without a tokenizer."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unknown name may cause a look at the adapters directory, and what lies there is whole; the limits have tests of their own."""
    monkeypatch.setattr(adapters, "SCAN_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(folders, "STEADY_SECONDS", 0.0)


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="session")
def adapters_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_family(folder / "soft", "soft", config=CONFIG)
    write_family(folder / "instance", "instance", config=CONFIG)
    return folder


@pytest.fixture(scope="session")
def start(talker: Path, adapters_dir: Path) -> Iterator[Callable[..., Serving]]:
    """Starts a server with these settings; all of them end with the session."""
    started: list[Serving] = []

    def make(**settings: Any) -> Serving:
        started.append(start_serving(talker, adapters_dir, **settings))
        return started[-1]

    yield make
    for serving in started:
        serving.stop()


@pytest.fixture(scope="session")
def serving(start: Callable[..., Serving]) -> Serving:
    """The server of every test that needs nothing special and leaves nothing behind."""
    return start()
