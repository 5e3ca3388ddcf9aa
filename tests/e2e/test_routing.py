"""`moa.return_routing` of the real process with the real OpenAI client, on the backend that serves here."""

import concurrent.futures
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from agreement import Scrape
from openai import BadRequestError, OpenAI
from servers import Running, running, write_adapters, write_talking_base

from moa_serve import LLM
from moa_serve.engine.routing import expert_names

FAMILIES = ("soft", "sparse_fn", "sparse_const", "instance", "adamole", "mola_layerwise", "nested_hydra", "partial")
ASK: dict[str, Any] = {"moa": {"return_routing": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("routing")
    write_talking_base(place / "base")
    write_adapters(place / "adapters", *FAMILIES, "lora")
    return place


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    adapters = {name: folder / "adapters" / name for name in FAMILIES}
    with LLM(folder / "base", adapters=adapters, device="cpu", kv_cache_bytes=2**22) as made:
        yield made


def streamed(client: OpenAI, model: str, prompt: str, *, is_chat: bool, max_tokens: int = 12) -> tuple[list[Any], Any]:
    """The pieces' `moa.routing`, in order, and the usage."""
    options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": max_tokens, "stream": True}
    options |= {"stream_options": {"include_usage": True}, "extra_body": ASK | {"ignore_eos": True}}
    if is_chat:
        chunks: list[Any] = list(client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **options))
    else:
        chunks = list(client.completions.create(prompt=prompt, **options))
    return [choice.moa["routing"] for chunk in chunks for choice in chunk.choices], chunks[-1].usage


@pytest.mark.parametrize("is_chat", [False, True], ids=["completions", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_tells_of_each_token_what_route_tells(server: Running, client: OpenAI, llm: LLM, family: str, is_chat: bool) -> None:
    """Natively to the last of four digits, with the experts in their places; and of the prompt that was really computed."""
    prompt = f"hello {family}"
    pieces, usage = streamed(client, family, prompt, is_chat=is_chat)
    body = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    ids = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
    _, manifest = llm._resolve(family)
    assert manifest is not None
    names = expert_names(manifest)
    assert pieces[0]["experts"] == names
    assert not any("experts" in piece for piece in pieces[1:])
    tokens = list(chain.from_iterable(piece["tokens"] for piece in pieces))
    assert len(tokens) == usage.completion_tokens == 12
    routing = llm.route(ids if manifest.is_pooled else ids + [token["id"] for token in tokens], adapter=family)
    for index, token in enumerate(tokens):
        place = len(ids) - 1 + (0 if manifest.is_pooled else index)
        for layer, experts in enumerate(names):
            expected = routing.weights[layer, place, : len(experts)].tolist()
            assert token["weights"][layer] == pytest.approx(expected, abs=5.1e-5)
            assert token["selected"][layer] == routing.selected[layer, place, : len(experts)].int().tolist()
            if routing.threshold is None:
                assert token["threshold"] is None
            else:
                told = float(routing.threshold[layer, place])
                assert token["threshold"][layer] == (pytest.approx(told, abs=5.1e-5) if experts else None)
    computed = len(ids) - usage.prompt_tokens_details.cached_tokens + len(tokens) - 1
    assert sum(usage.moa.values()) == computed * sum(map(len, names))


def test_it_is_refused_where_there_is_no_router(client: OpenAI) -> None:
    for model in ("base", "lora"):
        with pytest.raises(BadRequestError) as refused:
            client.completions.create(model=model, prompt="x", extra_body=ASK)
        assert refused.value.param == "moa.return_routing"
        assert "router" in refused.value.message


def test_a_prompts_routing_is_what_route_tells_of_every_family(server: Running, llm: LLM) -> None:
    """All in one batch, beside each other; on the backend that serves."""
    prompt = "Tom has 3 apples and buys 4 more ."
    body = {"models": list(FAMILIES), "prompt": prompt, "detail": "tokens"}
    answer = httpx.post(f"{server.url}/v1/moa/route", json=body).json()
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    is_native = httpx.get(f"{server.url}/version").json()["backend"] == "native"
    assert [data["model"] for data in answer["data"]] == list(FAMILIES)
    for data in answer["data"]:
        _, manifest = llm._resolve(data["model"])
        assert manifest is not None
        names, routing = expert_names(manifest), llm.route(ids, adapter=data["model"])
        assert (data["experts"], data["prompt_tokens"]) == (names, len(ids))
        num_skipped = 0
        for layer, experts in enumerate(names):
            weights, selected = routing.weights[layer, :, : len(experts)], routing.selected[layer, :, : len(experts)]
            num_skipped += int((~selected).sum())
            assert data["weights"][layer] == pytest.approx(weights.mean(0).tolist(), abs=1e-5)
            assert data["selected"][layer] == pytest.approx(selected.float().mean(0).tolist(), abs=1e-5)
            for place, token in enumerate(data["tokens"]):
                assert token["id"] == ids[place]
                assert token["weights"][layer] == pytest.approx(weights[place].tolist(), abs=5.1e-5)
                assert token["selected"][layer] == selected[place].int().tolist()
        assert data["evaluations_done"] + data["evaluations_skipped"] == len(ids) * sum(map(len, names))
        if is_native:
            assert data["evaluations_skipped"] == num_skipped
    page = Scrape(httpx.get(f"{server.url}/metrics").text)
    assert page.total("moa_expert_evaluations_skipped_total") >= sum(data["evaluations_skipped"] for data in answer["data"])


def test_a_mixed_crowd_is_told_all_that_is_counted(folder: Path) -> None:
    """Forty requests of all adapters at once, whole and streamed: their sums are the metrics', skipped ones included."""
    with running(folder) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

        def ask(number: int) -> tuple[int, int]:
            model, prompt = FAMILIES[number % len(FAMILIES)], "all of them " * (1 + number % 7)
            if number % 2:
                usage = streamed(client, model, prompt, is_chat=number % 4 == 1, max_tokens=20)[1]
            else:
                body = ASK | {"ignore_eos": True}
                answer = client.completions.create(model=model, prompt=prompt, max_tokens=20, n=1 + number % 3, extra_body=body)
                assert all(len(choice.moa["routing"]["tokens"]) == 20 for choice in answer.choices)  # type: ignore[attr-defined]
                usage = answer.usage
            return usage.moa["evaluations_done"], usage.moa["evaluations_skipped"]

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            told = list(pool.map(ask, range(40)))
        page = Scrape(httpx.get(f"{server.url}/metrics").text)
        assert page.total("moa_expert_computed_total") == sum(done for done, _ in told)
        assert page.total("moa_expert_evaluations_skipped_total") == sum(skipped for _, skipped in told)
        backend = httpx.get(f"{server.url}/version").json()["backend"]
        assert (sum(skipped for _, skipped in told) > 0) == (backend == "native")
