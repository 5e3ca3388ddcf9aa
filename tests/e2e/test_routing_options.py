"""Routing options of the real process with the real OpenAI client, on the backend that serves here."""

import concurrent.futures
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from servers import Running, write_adapters, write_talking_base

from moa_serve import LLM, SamplingParams

FAMILIES = ("soft", "sparse_fn", "instance", "unipeft", "mola_layerwise", "adamole", "nested_hydra")
OPTIONS: dict[str, dict[str, Any]] = {
    "soft": {"threshold": 0.55},
    "sparse_fn": {"mode": "soft", "disable": ["PROMPT", "Q@1-2"]},
    "instance": {"top_k": 3},
    "unipeft": {"disable": ["PROMPT", "P_ADAPTER"]},
    "mola_layerwise": {"top_k": 1},
    "adamole": {"threshold": {"scale": 0.25}},
    "nested_hydra": {"force": ["PROMPT"], "threshold": {"scale": 1.5}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("options")
    write_talking_base(place / "base")
    write_adapters(place / "adapters", *FAMILIES, "lora")
    return place


def ask(client: OpenAI, model: str, prompt: str, moa: dict[str, Any] | None, **more: Any) -> Any:
    return client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=10, logprobs=0, extra_body={"ignore_eos": True, "moa": moa or {}}, **more
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_that_of_the_library_under_the_same_options(server: Running, client: OpenAI, folder: Path, family: str) -> None:
    prompt, moa = f"a prompt for {family}", OPTIONS[family]
    told = ask(client, family, prompt, moa | {"return_routing": True})
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    with LLM(folder / "base", adapters={family: folder / "adapters" / family}, device="cpu", kv_cache_bytes=2**22) as llm:
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
        own, changed = llm.generate([ids] * 2, params, adapter=family, moa=[None, moa])
    choice = told.choices[0]
    assert [token["id"] for token in choice.moa["routing"]["tokens"]] == changed.token_ids
    assert choice.logprobs.token_logprobs == pytest.approx([token.logprob for token in changed.logprobs or ()], abs=1e-5)
    assert [one.logprob for one in own.logprobs or ()] != [one.logprob for one in changed.logprobs or ()], "the option must matter"
    echoed = told.moa["options"]
    assert {name: value for name, value in echoed.items() if name != "mode"} == {
        name: {"constant": value} if isinstance(value, float) else value for name, value in moa.items() if name != "mode"
    }
    assert echoed["mode"] == ("soft" if family in ("sparse_fn", "unipeft") else "sparse")


def test_a_stream_says_its_options_at_its_end(client: OpenAI) -> None:
    chunks = list(ask(client, "sparse_fn", "streamed", {"mode": "soft"}, stream=True))
    assert chunks[-1].moa["options"] == {"mode": "soft"}
    assert "options" not in list(ask(client, "sparse_fn", "streamed", None, stream=True))[-1].moa


def test_requests_of_one_batch_keep_their_own_rules(server: Running, client: OpenAI) -> None:
    """Forty at once, by the adapters' own rules and by others: each answer is the one that it gets alone, natively to the last bit."""
    jobs = [(FAMILIES[number % len(FAMILIES)], f"one of many {number}", number % 3) for number in range(40)]

    def run(job: tuple[str, str, int]) -> tuple[str, list[float]]:
        family, prompt, way = job
        answer = ask(client, family, prompt, OPTIONS[family] if way == 0 else {"disable": ["*@0"]} if way == 1 else None)
        return answer.choices[0].text, answer.choices[0].logprobs.token_logprobs

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        together = list(pool.map(run, jobs))
    alone = [run(job) for job in jobs]
    assert [text for text, _ in together] == [text for text, _ in alone]
    for (_, found), (_, expected) in zip(together, alone, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    if httpx.get(f"{server.url}/version").json()["backend"] == "native":
        assert [found for _, found in together] == [expected for _, expected in alone]


@pytest.mark.parametrize(
    ("model", "moa", "param", "part"),
    [
        ("sparse_fn", {"mode": "loud"}, "moa.mode", "'soft' or 'sparse'"),
        ("sparse_fn", {"threshold": 1.5}, "moa.threshold", "1"),
        ("sparse_fn", {"threshold": {"scale": 1, "constant": 0.5}}, "moa.threshold.scale", "exactly one"),
        ("sparse_fn", {"threshold": {"scale": "2"}}, "moa.threshold.scale", "number"),
        ("sparse_fn", {"top_k": 10}, "moa.top_k", "has 9 weights"),
        ("sparse_fn", {"disable": ["Q/0"]}, "moa.disable", "there are Q, K, V"),
        ("sparse_fn", {"disable": ["Q"] * 65}, "moa.disable", "64"),
        ("sparse_fn", {"disable": ["Q"], "force": ["Q@1"]}, "moa.force", "layer 1"),
        ("soft", {"mode": "sparse"}, "moa.mode", "no threshold of its own"),
        ("soft", {"threshold": {"scale": 2}}, "moa.threshold", "give a constant"),
        ("unipeft", {"disable": ["Q"]}, "moa.disable", "share a weight"),
        ("lora", {"mode": "soft"}, "moa.mode", "all experts of a lora always count"),
        ("base", {"top_k": 1}, "moa.top_k", "the base alone"),
    ],
)
def test_what_is_wrong_is_400_with_what_there_is(client: OpenAI, model: str, moa: dict[str, Any], param: str, part: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        ask(client, model, "x", moa)
    assert refused.value.param == param
    assert part in refused.value.message


def test_a_model_that_is_not_there_is_told_before_its_options(client: OpenAI) -> None:
    with pytest.raises(NotFoundError):
        ask(client, "nobody", "x", {"disable": ["Q"]})


def test_what_computes_nothing_takes_no_options(server: Running) -> None:
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": "x", "moa": {"threshold": 0.0}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "moa.threshold"


def test_fewer_experts_are_computed_for_a_request_that_wants_fewer(client: OpenAI, server: Running) -> None:
    """What is saved is told; with the torch backend nothing is."""
    usages = [
        ask(client, "soft", "count me", {"return_routing": True, "disable": names}).usage.moa
        for names in ([], ["PROMPT", "P_ADAPTER"], ["*"])
    ]
    if httpx.get(f"{server.url}/version").json()["backend"] == "native":
        total = sum(usages[0].values())
        assert usages[0]["evaluations_done"] == total
        assert usages[1]["evaluations_done"] < total
        assert usages[2]["evaluations_done"] == 0
