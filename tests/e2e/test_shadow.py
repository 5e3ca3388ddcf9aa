"""The shadow check of the real process, on the backend that serves here: numbers appear once it is quiet, and clients notice nothing."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from agreement import Scrape
from hostile import wait_until
from openai import OpenAI
from servers import Running, running, write_adapters, write_talking_base

SPARSE = ("sparse_fn", "mola_layerwise", "adamole")
PROMPTS = [f"number {number}, " * 12 for number in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shadow")
    write_talking_base(place / "base")
    write_adapters(place / "adapters", *SPARSE, "soft")
    return place


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[dict[tuple[str, str], str]]:
    """What a server without it answers."""
    with running(folder) as server:
        yield answers(server)


def answers(server: Running) -> dict[tuple[str, str], str]:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    more: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}

    def ask(job: tuple[str, str]) -> str:
        model, prompt = job
        return str(client.completions.create(model=model, prompt=prompt, **more).choices[0].text)

    jobs = [(model, prompt) for model in (*SPARSE, "soft") for prompt in PROMPTS]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(jobs, pool.map(ask, jobs), strict=True))


def page_of(server: Running) -> Scrape:
    return Scrape(httpx.get(f"{server.url}/metrics").text)


def test_after_a_quiet_moment_there_are_numbers(folder: Path, expected: dict[tuple[str, str], str]) -> None:
    """And answers that come while it is at work are, natively to the bit, those of a server without it."""
    with running(folder, "--shadow-share", "1") as server:
        backend = httpx.get(f"{server.url}/version").json()["backend"]
        assert answers(server) == expected or backend != "native"
        wait_until(lambda: page_of(server).total("moa_shadow_requests_total") > 0)
        assert answers(server) == expected or backend != "native"
        wait_until(lambda: page_of(server).total("moa_shadow_requests_total") == 2 * len(SPARSE) * len(PROMPTS))
        page = page_of(server)
        assert page.is_at_rest
        assert page.total("moa_shadow_skipped_total") == page.total("moa_shadow_requests_total", adapter="soft") == 0
        for adapter in SPARSE:
            tokens = page.total("moa_shadow_tokens_total", adapter=adapter)
            assert tokens == 2 * len(PROMPTS) * 24
            told = httpx.get(f"{server.url}/v1/adapters/{adapter}/experts").json()["shadow"]
            assert told["tokens"] == tokens
            assert told["mean_kl"] == pytest.approx(page.total("moa_shadow_kl_total", adapter=adapter) / tokens)
            assert 0 < told["mean_gap"] < 20
            assert 0 < told["flip_rate"] <= 1
        assert page.total("moa_requests_total") == 2 * len(expected)
        answers(server)
        assert server.stop(seconds=10) == 0, "it does not stay to score them"
