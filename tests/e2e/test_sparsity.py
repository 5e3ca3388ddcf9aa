"""Sparsity under pressure in the real process: a crowd, and what each of its answers says of itself."""

import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import pytest
from agreement import Scrape
from servers import running, write_adapters, write_talking_base

HEADER = "x-moa-threshold-scale"
FLAGS = ("--max-num-seqs", "2", "--max-waiting", "12", "--pressure-threshold-scale", "1.4", "--pressure-waiting", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pressure")
    write_talking_base(place / "base")
    write_adapters(place / "adapters", "sparse_fn", "soft", "adamole")
    return place


def test_a_crowd_is_served_within_the_floor_and_each_answer_can_be_had_again(folder: Path) -> None:
    """Twelve clients at two rows: thresholds rise, never above what was declared, for thresholds alone, and are down again afterwards."""
    models = ("sparse_fn", "soft", "adamole", "base")
    with running(folder, *FLAGS, "--pressure-adapters", "adamole=2") as server, httpx.Client(base_url=server.url, timeout=60) as http:

        def ask(number: int, moa: dict[str, Any] | None = None) -> httpx.Response:
            body = {"model": models[number % 4], "prompt": "all of them " * 3, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            answer = http.post("/v1/completions", json=body | ({"moa": moa} if moa else {}))
            answer.raise_for_status()
            return answer

        def come_again(client: int) -> list[tuple[int, httpx.Response]]:
            return [(client + turn, ask(client + turn)) for turn in range(3)]

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = [found for answered in pool.map(come_again, range(12)) for found in answered]
        scales: dict[str, list[float]] = {model: [] for model in models}
        for number, answer in answers:
            said = answer.json()["moa"].get("threshold_scale")
            assert answer.headers.get(HEADER) == (None if said is None else f"{said:g}")
            if said is not None:
                scales[models[number % 4]].append(said)
                again = ask(number, {"threshold": {"scale": said}})
                assert HEADER not in again.headers
                assert again.json()["choices"] == answer.json()["choices"]
        assert set(scales["sparse_fn"]) <= {1.1, 1.2, 1.3, 1.4}
        assert set(scales["adamole"]) <= {1.25, 1.5, 1.75, 2.0}
        assert max(scales["sparse_fn"]) > 1.1, "the crowd must be one, or this test shows nothing"
        assert scales["soft"] == scales["base"] == []
        assert HEADER not in ask(0).headers, "nobody waits any more"
        page = Scrape(http.get("/metrics").text)
        assert page.total("moa_raised_threshold_requests_total") == len(scales["sparse_fn"]) + len(scales["adamole"])
        assert page.total("moa_raised_threshold_requests_total", adapter="adamole") == len(scales["adamole"])
        assert page.total("moa_threshold_scale", adapter="adamole") == page.total("moa_threshold_scale", adapter="other") == 1.0
        lines = [line for line in server.log() if line.get("event") == "request" and line["threshold_scale"] is not None]
        assert sorted(line["threshold_scale"] for line in lines) == sorted(scales["sparse_fn"] + scales["adamole"])
