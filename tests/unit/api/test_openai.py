"""OpenAI's routes on a real engine: what they answer, what they refuse, and that whatever a request held is given back."""

import asyncio
import json
import threading
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Serving
from starlette.types import Message

from moa_serve.model.transformer import Transformer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8}
LONG: dict[str, Any] = {"model": "soft", "prompt": "abc", "max_tokens": 3000}


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


# -- completions


def test_a_completion_has_the_shape_that_clients_read(serving: Serving) -> None:
    answer = serving.ok(COMPLETIONS, model="soft", prompt="hello", seed=1)
    revision = answer["moa"]["revision"]
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"], answer["system_fingerprint"]) == ("text_completion", "soft", f"moa-{revision[:12]}")
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 16,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    (choice,) = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert (len(revision), answer["moa"]["adapter"], answer["moa"]["variant"]) == (64, "soft", "soft_moa")
    assert set(answer["moa"]["timings"]) == {"queue", "prefill", "first_token", "decode", "tokens_per_second"}
    assert all(value >= 0 for value in answer["moa"]["timings"].values())


def test_the_base_and_two_adapters_answer_under_their_names(serving: Serving) -> None:
    """Else an adapter could load "successfully" and silently serve the base."""
    answers = [serving.ok(COMPLETIONS, **GREEDY | {"model": name, "prompt": "hello"}) for name in ("tiny", "soft", "instance")]
    assert [answer["model"] for answer in answers] == ["tiny", "soft", "instance"]
    assert len({texts(answer)[0] for answer in answers}) == 3
    assert answers[0]["moa"]["adapter"] is None
    assert answers[0]["system_fingerprint"] == f"moa-{serving.server.base_digest[:12]}"


@pytest.mark.parametrize("model", ["tiny", "soft", "instance"])
def test_a_stream_says_what_the_whole_answer_says(serving: Serving, model: str) -> None:
    body = GREEDY | {"model": model, "prompt": ["hello", "x"], "n": 2, "max_tokens": 20, "logprobs": 2}
    whole, chunks = serving.ok(COMPLETIONS, **body), serving.events(COMPLETIONS, **body)
    for choice in whole["choices"]:
        mine = [item for chunk in chunks for item in chunk["choices"] if item["index"] == choice["index"]]
        assert "".join(item["text"] for item in mine) == choice["text"]
        assert list(chain.from_iterable(item["logprobs"]["tokens"] for item in mine)) == choice["logprobs"]["tokens"]
        assert list(chain.from_iterable(item["logprobs"]["text_offset"] for item in mine)) == choice["logprobs"]["text_offset"]
        assert [item["finish_reason"] for item in mine] == [None] * (len(mine) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_a_prompt_is_text_texts_ids_or_lists_of_ids(serving: Serving) -> None:
    ids = serving.ok("/tokenize", prompt="hello")["tokens"]
    (expected,) = texts(serving.ok(COMPLETIONS, **GREEDY | {"prompt": "hello"}))
    assert texts(serving.ok(COMPLETIONS, **GREEDY | {"prompt": ids})) == [expected]
    assert texts(serving.ok(COMPLETIONS, **GREEDY | {"prompt": ["x", "hello"]}))[1] == expected
    assert texts(serving.ok(COMPLETIONS, **GREEDY | {"prompt": [ids, ids]})) == [expected, expected]


def test_choices_are_numbered_by_prompt_and_n_and_differ(serving: Serving) -> None:
    """Equal seeds for the n answers of a prompt would give one answer n times."""
    body = {"model": "soft", "prompt": ["hello", "x"], "n": 3, "seed": 2**64 - 2, "max_tokens": 12, "temperature": 2}
    answer = serving.ok(COMPLETIONS, **body)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len(set(texts(answer))) == 6
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 72
    assert texts(serving.ok(COMPLETIONS, **body)) == texts(answer)


def test_stop_strings_cut_across_tokens_and_end_the_row(serving: Serving) -> None:
    body = GREEDY | {"model": "tiny", "prompt": "hello", "max_tokens": 3000}
    full = texts(serving.ok(COMPLETIONS, **body | {"max_tokens": 12}))[0]
    stop = full[5:8]
    for answer in (serving.ok(COMPLETIONS, **body, stop=stop), serving.ok(COMPLETIONS, **body, stop=["never\x00", stop])):
        (choice,) = answer["choices"]
        assert choice["text"] == full[: full.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        assert answer["usage"]["completion_tokens"] == full.index(stop) + len(stop)
    assert joined(serving.events(COMPLETIONS, **body, stop=stop)) == full[: full.index(stop)]
    serving.assert_clean()


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(serving: Serving) -> None:
    logprobs = serving.ok(COMPLETIONS, **GREEDY | {"prompt": "hello", "logprobs": 0})["choices"][0]["logprobs"]
    (stop,) = serving.ok("/tokenize", prompt=logprobs["tokens"][0])["tokens"]
    (choice,) = serving.ok(COMPLETIONS, **GREEDY | {"prompt": "hello", "stop_token_ids": [stop]})["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", stop)


def test_log_probabilities_stand_side_by_side(serving: Serving) -> None:
    (choice,) = serving.ok(COMPLETIONS, **GREEDY | {"prompt": "hello", "logprobs": 3})["choices"]
    logprobs = choice["logprobs"]
    assert {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {8}
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values())
        assert 3 <= len(top) <= 4
    assert logprobs["text_offset"][0] == 0


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echo_is_scored_but_for_its_first_token(serving: Serving, max_tokens: int, is_stream: bool) -> None:
    """How evaluation harnesses read likelihoods: the first token follows nothing, so it has none."""
    body = GREEDY | {"model": "soft", "prompt": ["hello"], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    choices = (
        serving.events(COMPLETIONS, **body)[-1]["choices"] if is_stream and not max_tokens else serving.ok(COMPLETIONS, **body)["choices"]
    )
    if is_stream and max_tokens:
        chunks = serving.events(COMPLETIONS, **body)
        assert joined(chunks) == choices[0]["text"]
    logprobs = choices[0]["logprobs"]
    assert choices[0]["text"].startswith("hello")
    assert logprobs["tokens"][:5] == list("hello")
    assert logprobs["text_offset"] == list(range(5 + max_tokens))
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    # The first generated token was the best one, so its score is what the prompt's last place gives it.
    again = serving.ok(COMPLETIONS, **GREEDY | {"model": "soft", "prompt": "hell", "max_tokens": 1, "logprobs": 5})
    top = again["choices"][0]["logprobs"]["top_logprobs"][0]
    if "o" in top:
        assert logprobs["token_logprobs"][4] == pytest.approx(top["o"], abs=1e-4)


def test_an_echo_without_scores_comes_first(serving: Serving) -> None:
    chunks = serving.events(COMPLETIONS, **GREEDY | {"prompt": "hello", "echo": True})
    assert joined(chunks) == texts(serving.ok(COMPLETIONS, **GREEDY | {"prompt": "hello", "echo": True}))[0]
    assert joined(chunks).startswith("hello")
    assert texts(serving.ok(COMPLETIONS, model="tiny", prompt=[75, 76], echo=True, max_tokens=0)) == ["ij"]


def test_an_echo_with_scores_survives_a_stop_string(serving: Serving) -> None:
    """The prompt's scores come when the engine ends the row, so a stop string must not end it before."""
    full = texts(serving.ok(COMPLETIONS, **GREEDY | {"prompt": "hello"}))[0]
    (choice,) = serving.ok(COMPLETIONS, **GREEDY | {"prompt": "hello", "echo": True, "logprobs": 0, "stop": full[2]})["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == 5 + full.index(full[2]) + 1
    assert None not in choice["logprobs"]["token_logprobs"][1:]


def test_the_usage_comes_in_a_last_chunk_without_choices(serving: Serving) -> None:
    body = GREEDY | {"prompt": "hello"}
    chunks = serving.events(COMPLETIONS, **body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert {chunk["usage"] for chunk in chunks[:-1]} == {None}
    assert chunks[-1]["moa"]["timings"]["first_token"] > 0
    chunks = serving.events(COMPLETIONS, **body, stream_options={"continuous_usage_stats": True})
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    chunks = serving.events(COMPLETIONS, **body)
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["moa"]["revision"] == serving.server.base_digest


def test_a_stream_is_not_kept_back_by_proxies(serving: Serving) -> None:
    headers = serving.post(COMPLETIONS, **GREEDY, prompt="x", stream=True).headers
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert headers["x-request-id"]


@pytest.mark.case(40)
def test_special_tokens_in_a_prompt_are_text_unless_asked(serving: Serving) -> None:
    """A user's text must not end his own turn."""
    body = GREEDY | {"prompt": "</s>a"}
    assert serving.ok(COMPLETIONS, **body)["usage"]["prompt_tokens"] == 5
    assert serving.ok(COMPLETIONS, **body, moa={"parse_special": True})["usage"]["prompt_tokens"] == 2
    assert serving.ok("/tokenize", prompt="</s>a", moa={"parse_special": True})["tokens"][0] == 2


def test_a_request_can_insist_on_a_revision(serving: Serving) -> None:
    revision = serving.ok(COMPLETIONS, **GREEDY | {"model": "soft", "prompt": "a"})["moa"]["revision"]
    for given in (revision, revision[:8]):
        assert serving.ok(COMPLETIONS, **GREEDY | {"model": "soft", "prompt": "a", "moa": {"revision": given}})
    response = serving.post(COMPLETIONS, **GREEDY | {"prompt": "a", "moa": {"revision": revision}})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "revision_not_found")
    serving.assert_clean()


def test_nulls_are_absent_and_metadata_changes_nothing(serving: Serving) -> None:
    body = GREEDY | {"prompt": "hello"}
    more = {"user": "u", "store": True, "metadata": {"a": 1}, "service_tier": "auto", "cache_salt": "s" * 128, "best_of": 1}
    nulls = dict.fromkeys(["stop", "seed", "logprobs", "suffix", "stream", "n", "logit_bias", "top_p", "tools"])
    assert texts(serving.ok(COMPLETIONS, **body, **more, **nulls)) == texts(serving.ok(COMPLETIONS, **body))


def test_sampling_parameters_reach_the_engine(serving: Serving) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 6}
    (forced,) = texts(serving.ok(COMPLETIONS, **body, logit_bias={"75": 100}))
    assert forced == "iiiiii"
    (best,) = texts(serving.ok(COMPLETIONS, **body, temperature=0))
    assert texts(serving.ok(COMPLETIONS, **body, temperature=2, top_k=1)) == [best]
    assert texts(serving.ok(COMPLETIONS, **body, temperature=2, top_p=1e-6)) == [best]
    assert texts(serving.ok(COMPLETIONS, **body, temperature=2, min_p=1)) == [best]
    both = {"75": 100, "76": 100}
    (penalised,) = texts(serving.ok(COMPLETIONS, **body | {"max_tokens": 80}, temperature=0, logit_bias=both, frequency_penalty=2))
    assert set(penalised) == {"i", "j"}


def test_the_default_length_yields_to_the_context(serving: Serving) -> None:
    room = 3
    prompt = [5] * (serving.server.max_model_len - room)
    assert serving.ok(COMPLETIONS, model="tiny", prompt=prompt)["usage"]["completion_tokens"] == room
    response = serving.post(COMPLETIONS, model="tiny", prompt=prompt, max_tokens=room + 1)
    assert response.json()["error"]["code"] == "context_length_exceeded"


# -- what is refused

OK = {"model": "tiny", "prompt": "x", "max_tokens": 1}
TALK = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
PICTURE = [{"type": "image_url", "image_url": {"url": "data:"}}]

CALL = "messages[0].tool_calls[0]"
REFUSED: list[tuple[str, str, Any, int, str, str | None]] = [
    # number in the table of faults, route, body (or fields to add to a good one), status, code, param
    ("25", COMPLETIONS, b"", 400, "invalid_json", None),
    ("25", COMPLETIONS, b"[]", 400, "invalid_json", None),
    ("25", COMPLETIONS, b"null", 400, "invalid_json", None),
    ("25", COMPLETIONS, b'{"model": "tiny"', 400, "invalid_json", None),
    ("25", COMPLETIONS, b"[" * 100_000, 400, "invalid_json", None),
    ("25", COMPLETIONS, b'{"seed": ' + b"9" * 6000 + b"}", 400, "invalid_json", None),
    ("25", COMPLETIONS, b'{"temperature": NaN}', 400, "invalid_json", None),
    ("25", COMPLETIONS, b'{"temperature": Infinity}', 400, "invalid_json", None),
    ("25", COMPLETIONS, b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400, "invalid_value", "temperature"),
    ("26", COMPLETIONS, b'{"model": "tiny", "prompt": "\xff"}', 400, "invalid_json", None),
    ("26", COMPLETIONS, '{"model": "tiny"}'.encode("utf-16"), 400, "invalid_json", None),
    ("26", COMPLETIONS, b'{"model": "tiny", "prompt": "a\\ud800"}', 400, "invalid_value", None),
    ("26", CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "a\\ud800"}]}', 400, "invalid_value", None),
    ("27", COMPLETIONS, {"temperature": "1"}, 400, "invalid_value", "temperature"),
    ("27", COMPLETIONS, {"temperature": 2.1}, 400, "invalid_value", "temperature"),
    ("27", COMPLETIONS, {"top_p": 0}, 400, "invalid_value", "top_p"),
    ("27", COMPLETIONS, {"stream": "yes"}, 400, "invalid_value", "stream"),
    ("27", COMPLETIONS, {"prompt": {"a": 1}}, 400, "invalid_value", "prompt"),
    ("27", COMPLETIONS, {"prompt": []}, 400, "invalid_value", "prompt"),
    ("27", COMPLETIONS, {"prompt": ""}, 400, "invalid_value", "prompt"),
    ("27", COMPLETIONS, {"prompt": None}, 400, "invalid_value", "prompt"),
    ("27", COMPLETIONS, {"model": None}, 400, "invalid_value", "model"),
    ("27", COMPLETIONS, {"stop": [""]}, 400, "invalid_value", "stop"),
    ("27", COMPLETIONS, {"stop": "s" * 5000}, 400, "invalid_value", "stop"),
    ("27", COMPLETIONS, {"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    ("27", COMPLETIONS, {"logit_bias": {"9999": 1}}, 400, "invalid_value", "logit_bias"),
    ("27", COMPLETIONS, {"min_tokens": 2}, 400, "invalid_value", "min_tokens"),
    ("27", COMPLETIONS, {"seed": 2**64}, 400, "invalid_value", "seed"),
    ("27", COMPLETIONS, {"stream_options": {}}, 400, "invalid_value", "stream_options"),
    ("27", COMPLETIONS, {"moa": {"revision": "HEAD"}}, 400, "invalid_value", "moa.revision"),
    ("28", COMPLETIONS, {"n": 9}, 400, "invalid_value", "n"),
    ("28", COMPLETIONS, {"best_of": 9}, 400, "unsupported_parameter", "best_of"),
    ("28", COMPLETIONS, {"logprobs": 6}, 400, "invalid_value", "logprobs"),
    ("28", CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    ("28", COMPLETIONS, {"stop": ["x"] * 17}, 400, "invalid_value", "stop"),
    ("28", COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "invalid_value", "logit_bias"),
    ("28", COMPLETIONS, {"prompt": ["x"] * 65}, 400, "invalid_value", "prompt"),
    ("28", COMPLETIONS, {"prompt": ["x"] * 64, "n": 8}, 400, "invalid_value", "n"),
    ("29", COMPLETIONS, {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ("29", CHAT, {"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ("29", COMPLETIONS, {"max_tokens": 10**6}, 400, "context_length_exceeded", "max_tokens"),
    ("29", COMPLETIONS, {"prompt": [5] * 5000}, 400, "context_length_exceeded", "prompt"),
    ("30", COMPLETIONS, {"prompt": "x" * 40_000}, 400, "context_length_exceeded", "prompt"),
    ("30", CHAT, {"messages": [{"role": "user", "content": "é" * 20_000}]}, 400, "context_length_exceeded", "messages"),
    ("31", COMPLETIONS, {"prompt": [-1]}, 400, "invalid_value", "prompt"),
    ("31", COMPLETIONS, {"prompt": [259]}, 400, "invalid_value", "prompt"),
    ("31", COMPLETIONS, {"stop_token_ids": [259]}, 400, "invalid_value", "stop_token_ids"),
    ("37", COMPLETIONS, {"model": "nobody"}, 404, "model_not_found", "model"),
    ("37", COMPLETIONS, {"model": "nobody", "stream": True}, 404, "model_not_found", "model"),
    ("37", CHAT, {"model": "../soft", "stream": True}, 404, "model_not_found", "model"),
    ("38", CHAT, {"chat_template": "x"}, 400, "unsupported_parameter", "chat_template"),
    ("38", CHAT, {"chat_template_kwargs": {}}, 400, "unsupported_parameter", "chat_template_kwargs"),
    ("38", COMPLETIONS, {"prompt_embeds": "x"}, 400, "unsupported_parameter", "prompt_embeds"),
    ("38", COMPLETIONS, {"lora_path": "x"}, 400, "unsupported_parameter", "lora_path"),
    ("38", CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter", "tools"),
    ("38", COMPLETIONS, {"tools": []}, 400, "unsupported_parameter", "tools"),
    ("38", COMPLETIONS, {"suffix": "x"}, 400, "unsupported_parameter", "suffix"),
    ("38", COMPLETIONS, {"n": 2, "best_of": 3}, 400, "unsupported_parameter", "best_of"),
    ("38", CHAT, {"response_format": {"type": "structural_tag"}}, 400, "invalid_value", "response_format.type"),
    ("38", CHAT, {"response_format": {"type": "json_object"}}, 400, "invalid_value", "response_format"),  # this base names no end of text
    ("38", COMPLETIONS, {"moa": {"return_routing": True}}, 400, "invalid_value", "moa.return_routing"),  # of the base, which has no router
    ("38", COMPLETIONS, {"tempreature": 1}, 400, "unknown_parameter", "tempreature"),
    ("38", COMPLETIONS, {"moa": {"routing": True}}, 400, "unknown_parameter", "moa.routing"),
    ("39", CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    ("39", CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    ("39", CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "unsupported_parameter", "messages"),
    ("39", CHAT, {"messages": [{"role": "user", "content": PICTURE}]}, 400, "invalid_value", "messages[0].content"),
    ("39", CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "invalid_value", "messages[0].content"),
    ("39", CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
    (
        "39",
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]},
        400,
        "invalid_value",
        "messages[0].tool_calls[0]",
    ),
    ("template", CHAT, {"messages": [*TALK["messages"], {"role": "system", "content": "x"}]}, 400, "invalid_value", "messages"),  # type: ignore[misc]
]


@pytest.mark.case(27, 28)
@pytest.mark.parametrize(("number", "path", "body", "status", "code", "param"), REFUSED)
def test_bad_input_is_refused_in_openais_shape(
    serving: Serving, number: str, path: str, body: Any, status: int, code: str, param: str | None
) -> None:
    """A client's library reads status, code and param; a 500 or a hang here is somebody's outage."""
    before = len(serving.metrics.records)
    raw = body if isinstance(body, bytes) else json.dumps((OK if path == COMPLETIONS else TALK) | body).encode()
    response = serving.run(serving.send("POST", path, content=raw, headers={"content-type": "application/json"}))
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert len(error["message"]) < 1100
    if param is not None:
        assert error["param"] == param
    (record,) = serving.metrics.records[before:]
    assert (record.finish_reason, record.status) == ("error", status)


def test_what_was_refused_left_nothing_behind(serving: Serving) -> None:
    for body in (
        {"prompt": "x", "max_tokens": 10**6},
        {"prompt": [259]},
        {"prompt": ["x", ""]},
        {"prompt": "x", "moa": {"revision": "0" * 8}},
    ):
        assert serving.post(COMPLETIONS, model="soft", **body).status_code in (400, 404)
    serving.assert_clean()


def test_text_of_any_kind_is_served(serving: Serving) -> None:
    """NUL, combining marks, right-to-left and emoji are text like any other."""
    answer = serving.ok(COMPLETIONS, model="tiny", prompt="\0 é\u202e 👩‍👩‍👧", max_tokens=0, echo=True)
    assert texts(answer) == ["\0 é\u202e 👩‍👩‍👧"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_a_body_that_does_not_say_that_it_is_json_is_refused(serving: Serving, kind: str) -> None:
    """A page of another site can send these types to a server on loopback without the browser asking."""
    response = serving.run(serving.send("POST", COMPLETIONS, content=json.dumps(OK), headers={"content-type": kind} if kind else {}))
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.case(36)
@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405)])
def test_wrong_paths_and_methods_have_the_same_shape(serving: Serving, method: str, path: str, status: int) -> None:
    response = serving.run(serving.send(method, path))
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert (status == 405) == ("allow" in response.headers)


def test_our_own_mistakes_tell_nothing(serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(name: str, **more: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(serving.server.registry, "lease", fail)
    response = serving.post(COMPLETIONS, **LONG)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert "secret" in caplog.text


# -- requests end once, whatever happens


def is_first_piece(message: Message) -> bool:
    return str(message["type"]) == "http.response.body"


def is_sent(message: Message) -> bool:
    return str(message["type"]) == "sent"


@pytest.mark.case(49)
@pytest.mark.parametrize("body", [{"stream": True}, {"stream": True, "n": 3}, {"stream": True, "prompt": ["a", "b"], "echo": True}])
def test_a_client_that_leaves_a_stream_frees_its_rows(serving: Serving, body: dict[str, Any]) -> None:
    """Else a row decodes for nobody, and its lease keeps the adapter for ever."""
    before = len(serving.metrics.records)
    sent = serving.run(serving.converse(COMPLETIONS, LONG | body, is_first_piece))
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
    (record,) = serving.metrics.records[before:]
    assert (record.finish_reason, record.status, record.adapter) == ("abort", 200, "soft")
    assert record.completion_tokens < 3000
    serving.assert_clean()


@pytest.mark.case(49)
@pytest.mark.parametrize("body", [{}, {"n": 3}, {"stream": True}])
def test_a_client_that_leaves_before_the_answer_frees_its_rows(serving: Serving, body: dict[str, Any]) -> None:
    before = len(serving.metrics.records)
    sent = serving.run(serving.converse(COMPLETIONS, LONG | body, is_sent))
    assert not any(b"usage" in message.get("body", b"") for message in sent)
    (record,) = serving.metrics.records[before:]
    assert record.finish_reason == "abort"
    serving.assert_clean()


def test_an_adapter_that_does_not_come_is_not_waited_for_without_end(narrow: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that hangs must not hold a request, and the place it takes, for ever."""

    async def hang(name: str, **more: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(narrow.server.registry, "lease", hang)
    response = narrow.post(COMPLETIONS, **LONG)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert narrow.server.num_preparing == 0


def test_a_cancelled_handler_frees_its_rows(serving: Serving) -> None:
    """What a server does with its tasks when it must end."""

    async def cancel() -> None:
        task = asyncio.ensure_future(serving.send("POST", COMPLETIONS, json=LONG))
        while not serving.server.engine.num_open:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    before = len(serving.metrics.records)
    serving.run(cancel())
    (record,) = serving.metrics.records[before:]
    assert record.finish_reason == "abort"
    serving.assert_clean()


def test_every_request_is_recorded_once_with_its_tokens(serving: Serving) -> None:
    before = len(serving.metrics.records)
    serving.post(COMPLETIONS, model="soft", prompt=["hello", "x"], n=2, max_tokens=5)
    serving.post(CHAT, model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=2, stream=True)
    first, second = serving.metrics.records[before:]
    assert (first.adapter, first.prompt_tokens, first.completion_tokens, first.finish_reason, first.n) == ("soft", 6, 20, "length", 2)
    assert (second.adapter, second.completion_tokens, second.endpoint, second.max_tokens) == (None, 2, CHAT, 2)
    for record in (first, second):
        assert record.scheduled is not None
        assert record.first_token is not None
        assert record.arrived <= record.scheduled <= record.first_token <= record.finished
        assert record.status == 200


def test_the_time_between_tokens_is_measured(serving: Serving) -> None:
    before = serving.metrics.num_gaps
    serving.ok(COMPLETIONS, model="tiny", prompt="x", max_tokens=200)
    assert 150 < serving.metrics.num_gaps - before <= 199


@pytest.fixture(scope="module")
def narrow(start: Callable[..., Serving]) -> Serving:
    """One row, one place to wait, short limits of time."""
    return start(max_num_seqs=1, max_waiting=1, queue_timeout_seconds=0.3, request_timeout_seconds=1.0)


async def together(narrow: Serving, *bodies: dict[str, Any]) -> list[Any]:
    """Requests that begin in this order, at the same time."""
    tasks = []
    for body in bodies:
        tasks.append(asyncio.ensure_future(narrow.send("POST", COMPLETIONS, json=body)))
        expected = min(len(tasks), 2)
        while narrow.server.engine.num_open < expected and not tasks[-1].done():
            await asyncio.sleep(0)
    return await asyncio.gather(*tasks)


@pytest.mark.case(53, 55)
def test_a_full_server_says_so_at_once_and_a_long_queue_after_a_while(narrow: Serving) -> None:
    """Waiting without end looks like a hang; the client's library retries after the time that it is told."""
    running, waiting, refused = narrow.run(together(narrow, LONG | {"model": "tiny", "stream": True}, OK, OK))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
    assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "queue_timeout")
    assert int(refused.headers["retry-after"]) >= 1 <= int(waiting.headers["retry-after"])
    assert running.status_code == 200
    assert narrow.server.engine.num_open == 0


@pytest.mark.case(55)
def test_a_request_that_takes_too_long_ends_with_an_error(narrow: Serving) -> None:
    whole = narrow.post(COMPLETIONS, **LONG | {"model": "tiny"})
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "request_timeout")
    stream = narrow.post(COMPLETIONS, **LONG | {"model": "tiny", "stream": True})
    *_, last, end = stream.text.split("\n\n")
    assert (stream.status_code, end) == (200, "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert [record.finish_reason for record in narrow.metrics.records[-2:]] == ["error", "error"]
    assert narrow.metrics.records[-1].status == 504
    assert narrow.server.engine.num_open == 0


def test_more_rows_than_can_ever_run_are_the_clients_mistake(narrow: Serving) -> None:
    """A 503 would be sent again and again, and refused each time."""
    response = narrow.post(COMPLETIONS, model="tiny", prompt="x", n=3)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")


@pytest.fixture(scope="module")
def shared(start: Callable[..., Serving]) -> Serving:
    """Two keys on two rows and two places to wait."""
    return start(max_num_seqs=2, max_waiting=2, api_key=["one", "two"])


def keyed(key: str, **body: Any) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}, "json": {"model": "tiny", "prompt": "x", **body}}


def test_a_key_that_floods_leaves_places_to_the_others(shared: Serving) -> None:
    """All of them taken, everybody else is told that the server is full, for as long as one client likes."""

    async def flood() -> list[Any]:
        tasks = []
        for number in range(4):
            tasks.append(asyncio.ensure_future(shared.send("POST", COMPLETIONS, **keyed("one", max_tokens=100))))
            while shared.server.rows_of_keys.total() < min(number + 1, 3) and not tasks[-1].done():
                await asyncio.sleep(0)
        other = await shared.send("POST", COMPLETIONS, **keyed("two", max_tokens=1))
        return [*await asyncio.gather(*tasks), other]

    *admitted, refused, other = shared.run(flood())
    assert [response.status_code for response in (*admitted, other)] == [200] * 4
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert shared.server.rows_of_keys.total() == 0
    assert shared.run(shared.send("POST", COMPLETIONS, **keyed("one", n=4, max_tokens=1))).status_code == 200, "alone it may have all"


def cached_tokens(serving: Serving, key: str | None = None, **body: Any) -> int:
    response = serving.run(serving.send("POST", COMPLETIONS, **keyed(str(key), max_tokens=1, **body)))
    assert response.status_code == 200, response.text
    number: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert number == serving.metrics.records[-1].cached_tokens
    return number


def test_a_prompt_is_cached_for_its_key_or_its_salt(shared: Serving) -> None:
    """A time to first token tells whether somebody else has asked the same: it is nobody's to know."""
    prompt = {"prompt": "a prompt of three pages, which is to say: more than forty-eight tokens"}
    assert [cached_tokens(shared, "one", **prompt) for _ in range(2)] == [0, 64]
    assert cached_tokens(shared, "two", **prompt) == 0
    key_id = next(iter(shared.server.rows_of_keys))
    assert cached_tokens(shared, "two", cache_salt=key_id, **prompt) == 0, "a salt is never taken for a key"
    assert cached_tokens(shared, "one", cache_salt=key_id, **prompt) == 64
    assert cached_tokens(shared, "one", model="soft", **prompt) == 0
    assert cached_tokens(shared, "one", n=2, **prompt) == 64, "of both answers, but they share the prompt"


def test_an_adapter_that_waits_for_a_slot_is_laid_out_in_a_worker_thread(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step that needs it first, everybody's next token would wait for it."""
    engine, warmed = serving.server.engine.engine, []
    model = engine.model

    def warm(adapter: Any) -> None:
        warmed.append((adapter.revision, threading.current_thread().name))
        Transformer.warm(model, adapter)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "warm", warm)
    revision = serving.ok(COMPLETIONS, model="soft", prompt="x", max_tokens=1)["moa"]["revision"]
    warmed.clear()
    serving.ok(COMPLETIONS, model="soft", prompt="x", max_tokens=1)
    assert not warmed, "it stands in a slot"
    engine.slot_table.drop(revision)
    serving.ok(COMPLETIONS, model="soft", prompt="x", max_tokens=1)
    [(found, thread)] = warmed
    assert found == revision
    assert thread != "moa-engine"


# -- the rest


def test_models_are_the_base_and_every_adapter(serving: Serving) -> None:
    data = serving.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in data] == [("tiny", None), ("instance", "tiny"), ("soft", "tiny")]
    assert data[0]["max_model_len"] == serving.server.max_model_len
    assert {model["object"] for model in data} == {"model"}
    assert not any("/" in model["root"] for model in data)
    assert serving.get("/v1/models/soft").json() == data[2]
    response = serving.get("/v1/models/no/such")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_tokens_go_there_and_back(serving: Serving) -> None:
    answer = serving.ok("/tokenize", prompt="<s>hé", return_token_strs=True)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == 6
    assert answer["max_model_len"] == serving.server.max_model_len
    assert 1 not in answer["tokens"]
    assert serving.ok("/detokenize", tokens=answer["tokens"])["prompt"] == "<s>hé"
    assert serving.ok("/detokenize", model="soft", tokens=[1, 75])["prompt"] == "<s>i"
    assert serving.ok("/tokenize", model="soft", messages=[{"role": "user", "content": "a"}])["tokens"][0] == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x" * 40_000}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/detokenize", {"tokens": [259]}, 400, "tokens"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
    ],
)
def test_bad_tokens_are_refused(serving: Serving, path: str, body: dict[str, Any], status: int, param: str) -> None:
    response = serving.post(path, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_health_follows_the_engine_and_the_drain(start: Callable[..., Serving]) -> None:
    serving = start()
    assert {serving.get(path).status_code for path in ("/health", "/health/live", "/health/ready")} == {200}
    serving.server.is_draining = True
    assert [serving.get(path).status_code for path in ("/health", "/health/ready", "/health/live")] == [503, 503, 200]
    response = serving.post(COMPLETIONS, **OK)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
    serving.server.is_draining = False
    serving.server.engine.failure = "KeyError: secret"
    answers = [serving.get(path) for path in ("/health", "/health/ready", "/health/live")]
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert not any("secret" in answer.text for answer in answers)
    assert serving.post(COMPLETIONS, **OK).json()["error"]["code"] == "not_ready"


def test_the_version_says_what_computes(serving: Serving) -> None:
    answer = serving.get("/version").json()
    assert (answer["version"], answer["base"], answer["backend"], answer["dtype"]) == ("0.0.0", "tiny", "torch", "float32")
    assert answer["base_dtype"] == "float32"


def test_metrics_can_be_scraped(serving: Serving) -> None:
    serving.ok(COMPLETIONS, **OK)
    page = serving.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert list(text_string_to_metric_families(page.text))


def test_the_document_describes_every_body(serving: Serving) -> None:
    """Clients are generated from it, and so are fuzzers: a reference that leads nowhere stops both."""
    document = serving.get("/openapi.json").json()
    schemas = document["components"]["schemas"]

    def references(value: Any) -> list[str]:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        found = [value["$ref"]] if isinstance(value, dict) and isinstance(value.get("$ref"), str) else []
        return found + [item for part in parts for item in references(part)]

    found = references(document)
    assert {"#/components/schemas/CompletionRequest", "#/components/schemas/Error"} <= set(found)
    assert all(reference.removeprefix("#/components/schemas/") in schemas for reference in found)
    assert "prompt" in schemas["CompletionRequest"]["properties"]


# -- a base without a tokenizer


@pytest.fixture(scope="module")
def mute(start: Callable[..., Serving]) -> Serving:
    return start(has_tokenizer=False)


def test_a_base_without_a_tokenizer_serves_ids(mute: Serving) -> None:
    answer = mute.ok(COMPLETIONS, model="soft", prompt=[5, 6], max_tokens=3, logprobs=1)
    assert texts(answer) == [""]
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["logprobs"]["tokens"][0].startswith("token_id:")
    assert mute.events(COMPLETIONS, model="soft", prompt=[5, 6], max_tokens=3)[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, OK, "prompt"),
        (COMPLETIONS, {"model": "tiny", "prompt": [5], "stop": "x"}, "stop"),
        (CHAT, TALK, "messages"),
        ("/tokenize", {"prompt": "x"}, "prompt"),
        ("/detokenize", {"tokens": [5]}, "tokens"),
    ],
)
def test_a_base_without_a_tokenizer_says_so(mute: Serving, path: str, body: dict[str, Any], param: str) -> None:
    response = mute.post(path, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert "tokenizer" in response.json()["error"]["message"]
