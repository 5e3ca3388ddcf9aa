"""What several modules start alike: the real process in their `folder`, and the real OpenAI client of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from servers import Running, running


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
