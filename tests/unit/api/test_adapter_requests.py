"""What a client sees of aliases, revisions and an adapter's own defaults."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from annotated_types import Ge, Gt, Le, MaxLen
from families import write_family
from openai import OpenAI
from serving import CONFIG, Serving, start_serving

from moa_serve.adapter.manifest import RequestDefaults
from moa_serve.api.schemas import CompletionRequest
from moa_serve.engine.request import MAX_STOP_STRINGS

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEFAULTS = {"temperature": 0.0, "max_tokens": 3, "stop_token_ids": [258]}


@pytest.fixture(scope="module")
def serving(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("adapters")
    for name, seed in (("v1", 1), ("v2", 2), ("shy", 3)):
        write_family(folder / name, "soft", seed=seed, config=CONFIG)
    manifest = json.loads((folder / "shy" / "adapter.json").read_text())
    (folder / "shy" / "adapter.json").write_text(json.dumps(manifest | {"defaults": DEFAULTS}))
    started = start_serving(talker, folder)
    yield started
    started.stop()


def put(serving: Serving, alias: str, **targets: int) -> None:
    response = serving.run(serving.send("PUT", f"/v1/aliases/{alias}", json={"targets": targets}))
    assert response.status_code == 200, response.text


def test_an_alias_is_a_model_like_any_other(serving: Serving) -> None:
    put(serving, "math", v1=9, v2=1)
    models = {model["id"]: model for model in serving.get("/v1/models").json()["data"]}
    assert (models["math"]["root"], models["math"]["parent"]) == ("v1", "tiny")
    assert serving.get("/v1/models/math").json() == models["math"]
    assert serving.ok("/tokenize", model="math", prompt="hi")["count"] > 0
    answers = [serving.ok(COMPLETIONS, model="math", prompt="hi", user=f"u{n}", temperature=0, ignore_eos=True) for n in range(30)]
    assert {answer["model"] for answer in answers} == {"math"}, "the name that was asked for"
    texts: dict[str, set[str]] = {}
    for answer in answers:
        texts.setdefault(answer["moa"]["adapter"], set()).add(answer["choices"][0]["text"])
    assert set(texts) == {"v1", "v2"}
    assert [len(found) for found in texts.values()] == [1, 1]
    again = serving.ok(COMPLETIONS, model="math", prompt="hi", user="u7")
    assert again["moa"]["adapter"] == answers[7]["moa"]["adapter"]
    events = serving.events(CHAT, model="math", messages=[{"role": "user", "content": "hi"}], max_tokens=2)
    assert events[-1]["moa"]["adapter"] in ("v1", "v2")


def test_a_key_keeps_its_target_where_no_user_is_named(talker: Path, tmp_path: Path) -> None:
    for name, seed in (("v1", 1), ("v2", 2)):
        write_family(tmp_path / name, "soft", seed=seed, config=CONFIG)
    keys = [f"key-{number}" for number in range(12)]
    serving = start_serving(talker, tmp_path, api_key=tuple(keys), admin_key="boss")
    try:

        def ask(key: str, method: str, path: str, body: Any) -> httpx.Response:
            response: httpx.Response = serving.run(serving.send(method, path, json=body, headers={"Authorization": f"Bearer {key}"}))
            return response

        assert ask("key-1", "PUT", "/v1/aliases/math", {"targets": {"v1": 1, "v2": 1}}).status_code == 403
        assert ask("boss", "PUT", "/v1/aliases/math", {"targets": {"v1": 1, "v2": 1}}).status_code == 200
        body = {"model": "math", "prompt": "hi", "max_tokens": 1}
        targets = {key: {ask(key, "POST", COMPLETIONS, body).json()["moa"]["adapter"] for _ in range(4)} for key in keys}
        assert all(len(found) == 1 for found in targets.values())
        assert len(set.union(*targets.values())) == 2
    finally:
        serving.stop()


def test_a_revision_may_be_asked_for(serving: Serving) -> None:
    revision = serving.ok(COMPLETIONS, model="v1", prompt="hi")["moa"]["revision"]
    assert serving.ok(COMPLETIONS, model="v1", prompt="hi", moa={"revision": revision[:8]})["moa"]["revision"] == revision
    for model in ("v1", "tiny"):
        response = serving.post(COMPLETIONS, model=model, prompt="hi", moa={"revision": "0" * 12})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "revision_not_found", "moa.revision")
    serving.assert_clean()


def test_an_adapters_defaults_are_for_what_the_client_leaves_out(serving: Serving) -> None:
    shy = serving.ok(COMPLETIONS, model="shy", prompt="hi")
    assert shy["moa"]["defaults"] == DEFAULTS
    assert shy["usage"]["completion_tokens"] <= 3
    assert shy["choices"][0]["text"] == serving.ok(COMPLETIONS, model="shy", prompt="hi")["choices"][0]["text"], "greedy"
    bold = serving.ok(COMPLETIONS, model="shy", prompt="hi", max_tokens=9, temperature=None, ignore_eos=True, stop_token_ids=[])
    assert bold["moa"]["defaults"] == {"temperature": 0.0}
    assert bold["usage"]["completion_tokens"] == 9
    for field in ("max_tokens", "max_completion_tokens"):
        chat = serving.ok(CHAT, model="shy", messages=[{"role": "user", "content": "hi"}], ignore_eos=True, stop_token_ids=[], **{field: 5})
        assert chat["usage"]["completion_tokens"] == 5
    assert "defaults" not in serving.ok(COMPLETIONS, model="v1", prompt="hi")["moa"]


def test_a_default_may_be_what_a_request_may() -> None:
    """The manifest knows nothing of HTTP, so its bounds stand there once more."""
    names = set(RequestDefaults.model_fields) - {"chat_template", "max_tokens"}  # 0 tokens are for scoring, which no adapter asks for
    for name in sorted(names):
        ours, theirs = (model.model_fields[name].metadata for model in (RequestDefaults, CompletionRequest))
        limits = [[one for one in found if isinstance(one, Ge | Gt | Le | MaxLen)] for found in (ours, theirs)]
        assert limits[0] == limits[1] or (name, limits) == ("stop", [[MaxLen(MAX_STOP_STRINGS)], []]), "stops are counted in SamplingParams"


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant] "


def with_template(folder: Path, template: str) -> None:
    write_family(folder, "soft", seed=4, config=CONFIG)
    manifest = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps(manifest | {"defaults": {"chat_template": template}}))


def test_an_adapters_chat_template_is_used_where_the_operator_lets_it(talker: Path, tmp_path: Path) -> None:
    with_template(tmp_path / "own", TEMPLATE)
    with_template(tmp_path / "endless", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi <s>"}], "max_tokens": 1}
    counts = {}
    for is_let in (False, True):
        serving = start_serving(talker, tmp_path, adapter_chat_templates=is_let)
        try:
            answer = serving.ok(CHAT, model="own", **body)
            assert "defaults" not in answer["moa"]
            counts[is_let] = answer["usage"]["prompt_tokens"]
            assert serving.ok(CHAT, model="tiny", **body)["usage"]["prompt_tokens"] == counts[False], "the base's own"
            if is_let:
                assert serving.server.sandbox is not None
                serving.server.sandbox._max_seconds = 0.3
                error = serving.post(CHAT, model="endless", **body).json()["error"]
                assert (error["code"], error["param"]) == ("invalid_value", "messages")
                assert "adapter's chat template" in error["message"]
                serving.server.sandbox.close()
        finally:
            serving.stop()
    assert counts[True] == len("[user] hi <s>[assistant] "), "a byte a token: what looks like a control token in a message is text"


def test_a_default_yields_to_the_context(serving: Serving) -> None:
    room = serving.server.max_model_len
    assert serving.ok(COMPLETIONS, model="shy", prompt=[5] * (room - 1), ignore_eos=True)["usage"]["completion_tokens"] == 1


def test_events_reach_a_client(serving: Serving) -> None:
    """Over a real connection; what comes is what the real server sends."""

    def listen(url: str) -> list[dict[str, Any]]:
        found = []
        is_listening = threading.Event()

        def change() -> None:
            assert is_listening.wait(10)
            for path in ("pin", "unpin"):
                assert httpx.post(f"{url}/v1/adapters/v1/{path}").status_code == 200

        changing = threading.Thread(target=change)
        changing.start()
        with httpx.stream("GET", f"{url}/v1/adapters/events", timeout=10) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            event: dict[str, Any] = {}
            for line in response.iter_lines():
                is_listening.set()
                if line.startswith("event: "):
                    event = {"kind": line.removeprefix("event: ")}
                elif line.startswith("data: "):
                    found.append(event | json.loads(line.removeprefix("data: ")))
                if len(found) == 2:
                    break
        changing.join()
        return found

    found = serving.over_http(listen)
    assert [(event["kind"], event["name"]) for event in found] == [("pinned", "v1"), ("unpinned", "v1")]


def test_the_openai_client_works_with_an_alias(serving: Serving) -> None:
    put(serving, "math", v1=1)

    def ask(url: str) -> Any:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        assert "math" in [model.id for model in client.models.list()]
        return client.chat.completions.create(model="math", messages=[{"role": "user", "content": "hi"}], max_tokens=3)

    assert serving.over_http(ask).model == "math"
