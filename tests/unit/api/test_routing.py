"""`moa.return_routing`: what an answer tells of its tokens' routing, streamed and whole, and what it refuses."""

import json
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, random_adapter, write_family
from prometheus_client.parser import text_string_to_metric_families
from serving import CONFIG, Serving, start_serving

from moa_serve import LLM, Routing, SamplingParams
from moa_serve.adapter.manifest import Manifest
from moa_serve.api.routing import RoutingText
from moa_serve.engine.routing import expert_names, has_thresholds

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ROUTED = ("soft", "sparse_fn", "instance", "adamole", "partial", "nested_hydra")
ASK: dict[str, Any] = {"moa": {"return_routing": True}}
GREEDY: dict[str, Any] = {"model": "soft", "prompt": "hello", "temperature": 0, "max_tokens": 8} | ASK
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def router_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    for family in (*ROUTED, "lora", "composition"):
        write_family(folder / family, family, config=CONFIG)
    return folder


@pytest.fixture(scope="module")
def routers(talker: Path, router_dir: Path) -> Iterator[Serving]:
    serving = start_serving(talker, router_dir)
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def llm(talker: Path, router_dir: Path) -> Iterator[LLM]:
    adapters = {family: router_dir / family for family in ROUTED}
    with LLM(talker, adapters=adapters, backend="torch", device="cpu", kv_cache_bytes=2**22) as made:
        yield made


def routing_of(choice: dict[str, Any]) -> list[dict[str, Any]]:
    tokens: list[dict[str, Any]] = choice["moa"]["routing"]["tokens"]
    return tokens


def of_stream(chunks: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return list(chain.from_iterable(map(routing_of, mine)))


def shown(manifest: Manifest, routing: Routing, place: int) -> dict[str, Any]:
    """An entry without its token, from the public `Routing`, as a naive reading of the document has it."""
    names = expert_names(manifest)
    entry: dict[str, Any] = {
        "weights": [routing.weights[layer, place, : len(experts)].tolist() for layer, experts in enumerate(names)],
        "selected": [routing.selected[layer, place, : len(experts)].int().tolist() for layer, experts in enumerate(names)],
        "threshold": None,
    }
    if routing.threshold is not None:
        entry["threshold"] = [float(routing.threshold[layer, place]) if experts else None for layer, experts in enumerate(names)]
    return entry


def check_entry(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert [len(layer) for layer in found["weights"]] == [len(layer) for layer in expected["weights"]]
    assert list(chain.from_iterable(found["weights"])) == pytest.approx(list(chain.from_iterable(expected["weights"])), abs=6e-5)
    assert found["selected"] == expected["selected"]
    if expected["threshold"] is None:
        assert found["threshold"] is None
    else:
        assert found["threshold"] == [None if value is None else pytest.approx(value, abs=6e-5) for value in expected["threshold"]]


# -- the text


@pytest.mark.parametrize("family", [family for family in FAMILIES if random_adapter(family)[0].router.site != "none"])
def test_the_text_is_what_json_would_say(family: str) -> None:
    """Digits are put into a text that was written before: one place too far and an expert has another's weight."""
    manifest, _ = random_adapter(family)
    names, text = expert_names(manifest), RoutingText(manifest)
    count, layers = sum(map(len, names)), sum(map(bool, names)) if has_thresholds(manifest) else 0
    drawn = np.random.default_rng(3)
    for round_ in range(20):
        weights, thresholds = drawn.random(count, dtype=np.float32) ** 3, drawn.random(layers, dtype=np.float32)
        weights[round_ % count] = (0.0, 1.0, 0.99996, 0.00004, 0.00006)[round_ % 5]
        kept = drawn.random(count) < 0.5
        words = np.concatenate((weights, kept, thresholds)).astype(np.float32)
        written = json.loads(text.write([(7, text.pack(words)), (8, text.pack(words))], None, has_names=round_ == 0))
        assert written["routing"].get("experts") == (names if round_ == 0 else None)
        first, second = written["routing"]["tokens"]
        assert (first.pop("id"), second.pop("id"), first.pop("token"), second.pop("token")) == (7, 8, "", "")
        assert first == second
        ends = np.cumsum([0, *map(len, names)]).tolist()
        spans = [slice(start, end) for start, end in pairwise(ends)]
        rounded = iter([round(float(value), 4) for value in thresholds])
        assert first["weights"] == [pytest.approx([round(float(value), 4) for value in weights[span]], abs=1.01e-4) for span in spans]
        assert list(chain.from_iterable(first["weights"])) == pytest.approx(weights.tolist(), abs=5.1e-5)
        assert first["selected"] == [kept[span].astype(int).tolist() for span in spans]
        expected = [pytest.approx(next(rounded), abs=1.01e-4) if layer else None for layer in names] if layers else None
        assert first["threshold"] == expected


def test_a_router_that_overflows_is_null_and_not_nan() -> None:
    """JSON has no NaN: one would end the stream of an answer that is good."""
    text = RoutingText(random_adapter("sparse_fn")[0])
    words = np.full(2 * 27 + 3, 0.5, dtype=np.float32)
    words[[0, 26, 54]], words[27] = [np.nan, np.inf, np.nan], 0
    (entry,) = json.loads(text.write([(1, text.pack(words))], None, has_names=False))["routing"]["tokens"]
    assert (entry["weights"][0][0], entry["weights"][0][1], entry["weights"][2][8]) == (None, 0.5, None)
    assert (entry["selected"][0][0], entry["threshold"]) == (0, [None, 0.5, 0.5])


def test_a_tokens_size_is_what_the_limit_takes_it_for() -> None:
    text = RoutingText(random_adapter("soft")[0])
    whole = text.write([(123, text.pack(np.ones(54, dtype=np.float32)))] * 100, None, has_names=False)
    assert 0.5 < len(whole) / (100 * text.bytes_per_token) <= 1


# -- answers


@pytest.mark.parametrize("family", ROUTED)
def test_each_token_has_the_routing_that_route_tells(routers: Serving, llm: LLM, family: str) -> None:
    answer = routers.ok(COMPLETIONS, **GREEDY | {"model": family})
    (choice,) = answer["choices"]
    prompt = routers.ok("/tokenize", prompt="hello")["tokens"]
    _, manifest = llm._resolve(family)
    assert manifest is not None
    tokens = routing_of(choice)
    assert choice["moa"]["routing"]["experts"] == expert_names(manifest)
    tokenizer = routers.server.tokenizer
    assert tokenizer is not None
    assert [token["token"] for token in tokens] == [tokenizer.token_text(token["id"]) for token in tokens]
    (completion,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), adapter=family)
    assert [token["id"] for token in tokens] == completion.token_ids
    assert len(tokens) == answer["usage"]["completion_tokens"] == 8
    ids = prompt if manifest.is_pooled else prompt + [token["id"] for token in tokens]
    routing = llm.route(ids, adapter=family)
    for index, token in enumerate(tokens):
        assert set(token) == {"id", "token", "weights", "selected", "threshold"}
        check_entry(token, shown(manifest, routing, len(prompt) - 1 + (0 if manifest.is_pooled else index)))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("family", ["soft", "adamole"])
def test_a_stream_tells_what_the_whole_answer_tells(routers: Serving, path: str, family: str) -> None:
    """Each piece with its tokens, the names in the first piece of each choice only."""
    body = {"model": family, "temperature": 0, "max_tokens": 12, "n": 2} | ASK
    body |= {"prompt": ["hello", "x"]} if path == COMPLETIONS else {"messages": MESSAGES}
    whole, chunks = routers.ok(path, **body), routers.events(path, **body, stream_options={"include_usage": True})
    assert len(whole["choices"]) == (4 if path == COMPLETIONS else 2)
    for choice in whole["choices"]:
        mine = [item for chunk in chunks for item in chunk["choices"] if item["index"] == choice["index"]]
        assert all(set(item["moa"]) == {"routing"} for item in mine)
        assert ["experts" in item["moa"]["routing"] for item in mine] == [True] + [False] * (len(mine) - 1)
        assert mine[0]["moa"]["routing"]["experts"] == choice["moa"]["routing"]["experts"]
        assert of_stream(chunks, choice["index"]) == routing_of(choice)
        assert len(routing_of(choice)) == 12
        assert sum(len(routing_of(item)) > 0 for item in mine) > 3, "as tokens come"
    # What was computed may differ by what the cache gave.
    assert set(whole["usage"]["moa"]) == set(chunks[-1]["usage"]["moa"]) == {"evaluations_done", "evaluations_skipped"}


def test_asking_changes_nothing_else(routers: Serving) -> None:
    """Nor does not asking: `false` is as if it were left out, and so is null."""
    for path, body in ((COMPLETIONS, {"prompt": "hello", "logprobs": 2}), (CHAT, {"messages": MESSAGES, "logprobs": True})):
        body |= {"model": "sparse_fn", "seed": 3, "max_tokens": 10}
        salts = iter("abcd")  # nobody's pages: the steps are the same
        moas: list[Any] = [{}, {"moa": {"return_routing": False}}, {"moa": {"return_routing": None}}]
        plain, *others = [routers.ok(path, **body, **moa, cache_salt=next(salts)) for moa in moas]
        asked = routers.ok(path, **body, **ASK, cache_salt=next(salts))
        for other in (asked, *others):
            for choice, expected in zip(other["choices"], plain["choices"], strict=True):
                assert {name: value for name, value in choice.items() if name != "moa"} == expected
        assert all("moa" not in other["usage"] for other in (plain, *others))
        assert all("moa" not in choice for other in (plain, *others) for choice in other["choices"])


def test_it_does_not_split_the_prefix_cache(routers: Serving) -> None:
    prompt = "a prompt of more than two pages, " * 3
    cached = [
        routers.ok(COMPLETIONS, **GREEDY | {"prompt": prompt, "cache_salt": "split", "moa": {"return_routing": asks}})["usage"]
        for asks in (True, False, True)
    ]
    found = [usage["prompt_tokens_details"]["cached_tokens"] for usage in cached]
    assert found[0] == 0 < found[1] == found[2]
    computed = [sum(usage["moa"].values()) / 27 for usage in (cached[0], cached[2])]
    assert computed == [len(prompt) + 7, len(prompt) - found[2] + 7], "what was cached was not computed, and neither is the last token"


def test_entries_are_those_of_the_tokens_that_the_client_gets(routers: Serving) -> None:
    """A stop string holds text back and drops what comes behind it; log-probabilities and routing go by tokens."""
    body = GREEDY | {"max_tokens": 60, "logprobs": 0}
    full = routers.ok(COMPLETIONS, **body)["choices"][0]
    stop = full["text"][5:8]
    for answer in (
        routers.ok(COMPLETIONS, **body, stop=stop),
        routers.ok(COMPLETIONS, **body, stop=[stop, "never\x00"]),
    ):
        (choice,) = answer["choices"]
        assert choice["stop_reason"] == stop
        assert len(routing_of(choice)) == len(choice["logprobs"]["tokens"]) == answer["usage"]["completion_tokens"] < 60
        assert routing_of(choice) == routing_of(full)[: len(routing_of(choice))]
    chunks = routers.events(COMPLETIONS, **body, stop=stop)
    assert of_stream(chunks) == routing_of(choice)
    token = routing_of(full)[2]["id"]
    (stopped,) = routers.ok(COMPLETIONS, **body, stop_token_ids=[token])["choices"]
    assert [entry["id"] for entry in routing_of(stopped)][-1] == token


def test_an_echo_has_entries_of_the_answer_only(routers: Serving) -> None:
    plain = routing_of(routers.ok(COMPLETIONS, **GREEDY)["choices"][0])
    for more in ({"echo": True}, {"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}):
        assert routing_of(routers.ok(COMPLETIONS, **GREEDY | more)["choices"][0]) == plain
    assert of_stream(routers.events(COMPLETIONS, **GREEDY | {"echo": True, "logprobs": 1})) == plain


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_only_scored_has_no_token_and_tells_what_was_computed(routers: Serving, stream: bool) -> None:
    body = GREEDY | {"max_tokens": 0, "echo": True}
    if stream:
        chunks = routers.events(COMPLETIONS, **body, stream_options={"include_usage": True})
        (choice,), usage = chunks[0]["choices"], chunks[-1]["usage"]
    else:
        answer = routers.ok(COMPLETIONS, **body)
        (choice,), usage = answer["choices"], answer["usage"]
    assert routing_of(choice) == []
    assert len(choice["moa"]["routing"]["experts"]) == 3
    assert usage["moa"] == {"evaluations_done": 5 * 27, "evaluations_skipped": 0}


def test_usage_so_far_on_every_chunk(routers: Serving) -> None:
    chunks = routers.events(COMPLETIONS, **GREEDY, stream_options={"include_usage": True, "continuous_usage_stats": True})
    done = [chunk["usage"]["moa"]["evaluations_done"] for chunk in chunks]
    assert done == sorted(done)
    assert done[0] > 0
    assert done[-1] == (5 + 7) * 27


def counted(serving: Serving, name: str) -> float:
    families = text_string_to_metric_families(serving.get("/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def test_usage_adds_up_to_the_metrics(talker: Path, router_dir: Path) -> None:
    """All traffic asks, so what the requests were told is what was counted. The native backend's are in tests/e2e."""
    serving = start_serving(talker, router_dir)
    try:
        done = skipped = 0
        for model in ROUTED:
            for more in ({}, {"n": 2, "seed": 1, "temperature": 1}, {"prompt": ["hello", "you " * 30]}, {"echo": True, "max_tokens": 0}):
                usage = serving.ok(COMPLETIONS, **GREEDY | {"model": model} | more)["usage"]["moa"]
                done, skipped = done + usage["evaluations_done"], skipped + usage["evaluations_skipped"]
        assert counted(serving, "moa_expert_computed_total") == done > 0
        assert counted(serving, "moa_expert_evaluations_skipped_total") == skipped == 0
    finally:
        serving.stop()


# -- what is refused


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("model", "reason"), [("tiny", "the base"), ("lora", "a lora"), ("composition", "a composition")])
@pytest.mark.parametrize("stream", [False, True])
def test_who_has_no_router_has_no_routing(routers: Serving, path: str, model: str, reason: str, stream: bool) -> None:
    body = {"model": model, "stream": stream, "max_tokens": 2} | ({"prompt": "x"} if path == COMPLETIONS else {"messages": MESSAGES})
    response = routers.post(path, **body, **ASK)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_value")
    assert error["param"] == "moa.return_routing"
    assert reason in error["message"]
    assert routers.post(path, **body, moa={"return_routing": False}).status_code == 200
    routers.assert_clean()


@pytest.mark.parametrize("value", ["yes", 1, 0, [], {}, "true"])
def test_it_is_a_boolean(routers: Serving, value: Any) -> None:
    response = routers.post(COMPLETIONS, **GREEDY | {"moa": {"return_routing": value}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "moa.return_routing")


def test_a_route_that_computes_nothing_has_none(routers: Serving) -> None:
    response = routers.post("/tokenize", prompt="x", **ASK)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "moa.return_routing")


def test_what_would_have_to_be_held_is_bounded(routers: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole answer is held until it ends, a stream as far as its reader is behind: that many bytes and no more."""
    one = RoutingText(random_adapter("soft")[0]).bytes_per_token
    monkeypatch.setattr("moa_serve.api.generation.MAX_BYTES", 300 * one)
    long = GREEDY | {"max_tokens": 301}
    for body in (long, long | {"max_tokens": 101, "n": 3, "temperature": 1}, long | {"stream": True, "echo": True, "logprobs": 0}):
        response = routers.post(COMPLETIONS, **body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "moa.return_routing")
        assert "lower max_tokens" in error["message"]
    response = routers.post(CHAT, model="soft", messages=MESSAGES, **ASK)  # up to the end of the context
    assert response.json()["error"]["param"] == "moa.return_routing"
    assert len(routing_of(routers.ok(COMPLETIONS, **long | {"max_tokens": 300})["choices"][0])) == 300
    assert len(of_stream(routers.events(COMPLETIONS, **long))) == 301
    routers.assert_clean()


# -- requests end once, whatever happens


def test_a_client_that_leaves_frees_its_rows(routers: Serving) -> None:
    body = GREEDY | {"max_tokens": 2000, "n": 4, "temperature": 1, "stream": True}
    sent = routers.run(routers.converse(COMPLETIONS, body, lambda message: message["type"] == "http.response.body"))
    assert b'"routing"' in sent[1]["body"]
    routers.assert_clean()


def test_thirty_two_rows_at_once(routers: Serving, llm: LLM) -> None:
    """Every one has its own tokens' routing, though they shared their steps."""
    prompts = [f"row {index}" for index in range(16)]
    answer = routers.ok(COMPLETIONS, **GREEDY | {"model": "sparse_fn", "prompt": prompts, "n": 2, "max_tokens": 5})
    _, manifest = llm._resolve("sparse_fn")
    assert manifest is not None
    for choice in answer["choices"]:
        prompt = routers.ok("/tokenize", prompt=prompts[choice["index"] // 2])["tokens"]
        tokens = routing_of(choice)
        routing = llm.route(prompt + [token["id"] for token in tokens], adapter="sparse_fn")
        for index, token in enumerate(tokens):
            check_entry(token, shown(manifest, routing, len(prompt) - 1 + index))


def test_a_base_without_a_tokenizer_tells_ids(talker: Path, router_dir: Path) -> None:
    serving = start_serving(talker, router_dir, has_tokenizer=False)
    try:
        (choice,) = serving.ok(COMPLETIONS, **GREEDY | {"prompt": [5, 6, 7]})["choices"]
        assert [token["token"] for token in routing_of(choice)] == [""] * 8
        assert all(0 <= token["id"] < 259 for token in routing_of(choice))
    finally:
        serving.stop()
