"""Servers for the tests of this folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import write_family
from serving import CONFIG, Serving, start_serving, write_talker


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
