"""/v1/moa/route: what it tells of a prompt, alone and in a mixed batch, what it refuses, and that it gives back what it took."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import write_family
from serving import CONFIG, Serving, start_serving

from moa_serve import LLM
from moa_serve.adapter.manifest import Manifest
from moa_serve.api.routing import RoutingText
from moa_serve.engine.routing import Routing, expert_names

ROUTE = "/v1/moa/route"
ROUTED = ("soft", "sparse_fn", "instance", "adamole", "partial", "nested_hydra")
MESSAGES = [{"role": "user", "content": "hello"}]
TOKENS_A_MINUTE = 20_000


@pytest.fixture(scope="module")
def router_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routers")
    for family in (*ROUTED, "lora"):
        write_family(folder / family, family, config=CONFIG)
    return folder


@pytest.fixture(scope="module")
def routers(talker: Path, router_dir: Path) -> Iterator[Serving]:
    serving = start_serving(talker, router_dir, key_tokens_per_minute=TOKENS_A_MINUTE, api_key=["k"])
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def llm(talker: Path, router_dir: Path) -> Iterator[LLM]:
    adapters = {family: router_dir / family for family in ROUTED}
    with LLM(talker, adapters=adapters, backend="torch", device="cpu", kv_cache_bytes=2**22) as made:
        yield made


def ask(serving: Serving, path: str = ROUTE, **body: Any) -> Any:
    return serving.run(serving.send("POST", path, json=body, headers={"Authorization": "Bearer k"}))


def ok(serving: Serving, **body: Any) -> Any:
    response = ask(serving, **body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(serving: Serving, **body: Any) -> tuple[int, str, str, str]:
    response = ask(serving, **body)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"], error["message"]


def check(data: dict[str, Any], ids: list[int], manifest: Manifest, routing: Routing) -> None:
    """An entry with its tokens against the public `Routing`."""
    names = expert_names(manifest)
    assert data["experts"] == names
    assert [token["id"] for token in data["tokens"]] == ids
    assert data["prompt_tokens"] == len(ids)
    for layer, experts in enumerate(names):
        count = len(experts)
        weights, selected = routing.weights[layer, :, :count], routing.selected[layer, :, :count].float()
        assert data["weights"][layer] == pytest.approx(weights.mean(0).tolist(), abs=1e-5)
        assert data["selected"][layer] == pytest.approx(selected.mean(0).tolist(), abs=1e-5)
        for place, token in enumerate(data["tokens"]):
            assert token["weights"][layer] == pytest.approx(weights[place].tolist(), abs=6e-5)
            assert token["selected"][layer] == selected[place].int().tolist()
    if routing.threshold is None:
        assert data["threshold"] is None
        assert all(token["threshold"] is None for token in data["tokens"])
    else:
        for layer, experts in enumerate(names):
            told = routing.threshold[layer]
            assert data["threshold"][layer] == (pytest.approx(float(told.mean()), abs=1e-5) if experts else None)
            for place, token in enumerate(data["tokens"]):
                assert token["threshold"][layer] == (pytest.approx(float(told[place]), abs=6e-5) if experts else None)
    assert data["evaluations_done"] + data["evaluations_skipped"] == len(ids) * sum(map(len, names))


def test_every_family_in_one_batch_tells_what_route_tells(routers: Serving, llm: LLM) -> None:
    """A neighbour's numbers, or a column too far, would be an adapter's routing that never was."""
    answer = ok(routers, models=list(ROUTED), prompt="hello world", detail="tokens")
    ids = ask(routers, "/tokenize", prompt="hello world").json()["tokens"]
    assert answer["object"] == "moa.route"
    assert [data["model"] for data in answer["data"]] == [data["adapter"] for data in answer["data"]] == list(ROUTED)
    for data in answer["data"]:
        revision, manifest = llm._resolve(data["model"])
        assert manifest is not None
        assert (data["revision"], data["variant"]) == (revision, manifest.variant)
        check(data, ids, manifest, llm.route(ids, adapter=data["model"]))
        assert "options" not in data
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == len(ids) * len(ROUTED)


def test_options_change_the_routing_and_are_echoed(routers: Serving, llm: LLM) -> None:
    options = {"threshold": {"constant": 0.5}, "disable": ["Q"]}
    answer = ok(routers, model="soft", prompt=[5, 6, 7, 8], detail="tokens", moa=options)
    (data,) = answer["data"]
    _, manifest = llm._resolve("soft")
    assert manifest is not None
    routing = llm.route([5, 6, 7, 8], adapter="soft", moa=options)
    check(data, [5, 6, 7, 8], manifest, routing)
    assert data["options"] == {"mode": "sparse", **options}
    assert not routing.selected.all()


def test_a_chat_is_rendered_as_it_is_answered(routers: Serving) -> None:
    ids = ask(routers, "/tokenize", messages=MESSAGES).json()["tokens"]
    (data,) = ok(routers, model="soft", messages=MESSAGES, detail="tokens")["data"]
    assert [token["id"] for token in data["tokens"]] == ids
    assert "tokens" not in ok(routers, model="soft", messages=MESSAGES)["data"][0]


def test_a_revision_is_the_one_that_was_asked_for(routers: Serving, llm: LLM) -> None:
    revision, _ = llm._resolve("soft")
    assert revision is not None
    assert ok(routers, model="soft", prompt="x", moa={"revision": revision[:12]})["data"][0]["revision"] == revision
    assert refused(routers, model="soft", prompt="x", moa={"revision": "0" * 12})[:3] == (404, "revision_not_found", "moa.revision")


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "says"),
    [
        ({"model": "tiny"}, 400, "invalid_value", "model", "no router"),
        ({"model": "lora"}, 400, "invalid_value", "model", "lora without a router"),
        ({"models": ["soft", "lora"]}, 400, "invalid_value", "models", "'lora'"),
        ({"model": "nobody"}, 404, "model_not_found", "model", "nobody"),
        ({"models": ["soft", "nobody"]}, 404, "model_not_found", "models", "nobody"),
        ({}, 400, "invalid_value", "model", "one of the two"),
        ({"model": "soft", "models": ["soft"]}, 400, "invalid_value", "model", "one of the two"),
        ({"models": ["soft", "soft"]}, 400, "invalid_value", "models", "twice"),
        ({"models": []}, 400, "invalid_value", "models", "at least 1"),
        ({"models": [f"a{i}" for i in range(17)]}, 400, "invalid_value", "models", "at most 16"),
        ({"model": "soft", "prompt": "x", "messages": MESSAGES}, 400, "invalid_value", "prompt", "one of the two"),
        ({"model": "soft", "prompt": ["x", "y"]}, 400, "invalid_value", "prompt", "list of token ids"),
        ({"model": "soft", "prompt": [300]}, 400, "invalid_value", "prompt", "vocabulary"),
        ({"model": "soft", "prompt": ""}, 400, "invalid_value", "prompt", "empty"),
        ({"model": "soft", "prompt": [5] * 5000}, 400, "context_length_exceeded", "prompt", "5000"),
        ({"model": "soft", "detail": "all"}, 400, "invalid_value", "detail", "tokens"),
        ({"model": "soft", "max_tokens": 3}, 400, "unknown_parameter", "max_tokens", "max_tokens"),
        ({"model": "soft", "moa": {"return_routing": True}}, 400, "unsupported_parameter", "moa.return_routing", "not supported"),
        ({"models": ["soft"], "moa": {"revision": "0" * 12}}, 400, "invalid_value", "moa.revision", "goes with model"),
        ({"models": ["sparse_fn", "soft"], "moa": {"threshold": {"scale": 2}}}, 400, "invalid_value", "moa.threshold", "'soft'"),
        ({"model": "soft", "moa": {"disable": ["NOBODY"]}}, 400, "invalid_value", "moa.disable", "NOBODY"),
    ],
)  # fmt: skip
def test_what_it_refuses(routers: Serving, body: dict[str, Any], status: int, code: str, param: str, says: str) -> None:
    """Each names the field as the client wrote it, and leaves nothing behind."""
    sent = body if {"prompt", "messages"} & set(body) else {**body, "prompt": "x"}
    found = refused(routers, **sent)
    assert found[:3] == (status, code, param)
    assert says in found[3]
    assert_free(routers)


def assert_free(serving: Serving) -> None:
    ok(serving, model="soft", prompt=[5])  # the engine takes commands in order, so one request flushes them
    server = serving.server
    assert server.engine.num_open == server.num_preparing == server.rows_of_keys.total() == 0
    assert server.engine.engine.block_pool.num_held == 0
    assert not server.engine.engine.collected
    assert not any(item.leases for item in server.registry.items())


def test_a_long_prompts_tokens_are_refused_before_anything_runs(routers: Serving, monkeypatch: pytest.MonkeyPatch, llm: LLM) -> None:
    """The text of one prompt under sixteen adapters could be all of the memory; the means of the same prompt are small."""
    _, manifest = llm._resolve("soft")
    assert manifest is not None
    one = RoutingText(manifest)
    monkeypatch.setattr("moa_serve.api.prompt_routing.MAX_BYTES", 10 * one.bytes_per_token)
    body: dict[str, Any] = {"model": "soft", "prompt": [5] * 11}
    steps = routers.server.engine.load.steps
    status, _, param, message = refused(routers, **body, detail="tokens")
    assert (status, param) == (400, "detail")
    assert "'summary'" in message
    assert routers.server.engine.load.steps == steps
    assert ok(routers, **body)["data"][0]["prompt_tokens"] == 11
    assert len(ok(routers, **body | {"prompt": [5] * 10}, detail="tokens")["data"][0]["tokens"]) == 10
    monkeypatch.setattr("moa_serve.api.prompt_routing.MAX_HELD_BYTES", 10 * 9 * one.num_experts)
    status, _, param, message = refused(routers, **body)
    assert (status, param) == (400, "prompt")
    assert "shorter" in message


def test_it_counts_for_each_adapter_and_is_one_line_of_the_log(routers: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """Metrics know what each adapter had to do; whoever reads the log sees one request."""
    records = routers.metrics.records
    start = len(records)
    with caplog.at_level("INFO", logger="moa_serve.request"):
        ask(routers, models=["soft", "adamole"], prompt=[5, 6, 7])
    assert [(record.adapter, record.prompt_tokens, record.status, record.endpoint) for record in records[start:]] == [
        ("soft", 3, 200, ROUTE),
        ("adamole", 3, 200, ROUTE),
    ]
    lines = [record.__dict__["moa_event"] for record in caplog.records if record.getMessage() == "request"]
    assert [(line["model"], line["prompt_tokens"], line["endpoint"]) for line in lines] == [("soft, adamole", 6, ROUTE)]
    answer = ask(routers, models=["soft", "adamole"], prompt=[5] * 1000)
    left = int(answer.headers["x-ratelimit-remaining-tokens"])
    assert left < TOKENS_A_MINUTE - 1500  # the key pays for the tokens of every adapter, and got back few of them meanwhile
    ask(routers, models=["soft", "nobody"], prompt="x")
    assert (records[-1].status, records[-1].finish_reason) == (404, "error")


def test_rows_are_counted_like_any_others(talker: Path, router_dir: Path) -> None:
    """Sixteen adapters of one request are sixteen rows, or a client could have sixteen times its share."""
    serving = start_serving(talker, router_dir, max_num_seqs=2, max_waiting=1)
    try:
        many = serving.post(ROUTE, models=list(ROUTED[:4]), prompt="x")
        assert (many.status_code, many.json()["error"]["param"]) == (400, "models")
        assert serving.post(ROUTE, models=list(ROUTED[:3]), prompt="x").status_code == 200

        async def crowd() -> list[int]:
            bodies = [{"models": list(ROUTED[:2]), "prompt": [5] * 500} for _ in range(4)]
            return [answer.status_code for answer in await asyncio.gather(*(serving.send("POST", ROUTE, json=body) for body in bodies))]

        statuses = serving.run(crowd())
        assert set(statuses) == {200, 503}
        serving.assert_clean()
    finally:
        serving.stop()


def test_who_leaves_or_waits_too_long_holds_nothing(talker: Path, router_dir: Path) -> None:
    serving = start_serving(talker, router_dir)
    try:
        body: dict[str, Any] = {"models": list(ROUTED), "prompt": [5] * 2000}
        serving.ok(ROUTE, **body | {"prompt": "x"})  # an adapter's first load goes on for others
        assert serving.run(serving.converse(ROUTE, body, lambda message: message["type"] == "sent")) == []
        assert (serving.metrics.records[-1].finish_reason, serving.metrics.records[-1].status) == ("abort", 499)
        serving.assert_clean()
        serving.server.settings = serving.server.settings.model_copy(update={"request_timeout_seconds": 0.01})
        late = serving.post(ROUTE, **body)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
        serving.server.settings = serving.server.settings.model_copy(update={"request_timeout_seconds": 60.0})
        serving.assert_clean()
    finally:
        serving.stop()


def test_it_is_in_the_document(routers: Serving) -> None:
    document = routers.run(routers.send("GET", "/openapi.json", headers={"Authorization": "Bearer k"})).json()
    schema = document["paths"][ROUTE]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/PromptRoutings"}
