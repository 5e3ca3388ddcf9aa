"""What `parse` takes, what it refuses, and how it names what is wrong."""

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_serve.api.errors import (
    InvalidJson,
    UnknownParameter,
    UnsupportedParameter,
    dump_json,
    error_response,
    response_of,
    status_of,
    type_of,
)
from moa_serve.api.schemas import ChatRequest, CompletionRequest, Schema, TokenizeRequest, parse
from moa_serve.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterLimit,
    AdapterMemory,
    AdapterNotFound,
    AdapterQuarantined,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    MoaError,
    Overloaded,
)

PROMPT = {"model": "m", "prompt": "x"}
TALK = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps(PROMPT | fields).encode())


def refusal(schema: type[Schema], body: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(schema, body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), ("", [""]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_has_four_forms(prompt: Any, prompts: list[Any]) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_a_null_is_absent_at_every_depth() -> None:
    """Clients send every field that they know, with null for what was not set."""
    body = completion(stop=None, tools=None, anything=None, stream=True, stream_options={"include_usage": None}, moa={"revision": None})
    assert body == completion(stream=True, stream_options={})
    message = {"role": "user", "content": "x", "tool_calls": None, "name": None}
    assert parse(ChatRequest, json.dumps(TALK | {"messages": [message]}).encode()) == parse(ChatRequest, json.dumps(TALK).encode())


def test_parameters_become_sampling_parameters() -> None:
    params = completion(stop="a", logit_bias={"7": -1}, top_k=-1, seed=-5, stop_token_ids=[3], ignore_eos=True).sampling(4, None)
    assert (params.stop, params.logit_bias, params.top_k, params.seed, params.max_tokens) == (("a",), {7: -1.0}, -1, -5, 4)
    assert (params.stop_token_ids, params.ignore_eos, params.temperature, params.logprobs) == ((3,), True, 1.0, None)


@pytest.mark.parametrize(
    ("schema", "body", "kind", "param"),
    [
        (CompletionRequest, PROMPT | {"nonsense": 1}, UnknownParameter, "nonsense"),
        (CompletionRequest, PROMPT | {"[": 1}, UnknownParameter, "["),
        (CompletionRequest, PROMPT | {"x" * 500: 1}, UnknownParameter, "x" * 80),
        (CompletionRequest, PROMPT | {"messages": []}, UnknownParameter, "messages"),
        (CompletionRequest, PROMPT | {"tools": [], "nonsense": 1}, UnsupportedParameter, "tools"),
        (CompletionRequest, PROMPT | {"stream": True, "stream_options": {"x": 1}}, UnknownParameter, "stream_options.x"),
        (ChatRequest, TALK | {"echo": True}, UnsupportedParameter, "echo"),
        (ChatRequest, TALK | {"modalities": ["audio"]}, UnsupportedParameter, "modalities"),
        (ChatRequest, TALK | {"moa": {"parse_special": True}}, UnsupportedParameter, "moa.parse_special"),
        (ChatRequest, TALK | {"messages": [{"role": "user", "content": "x", "name": "n"}]}, UnsupportedParameter, "messages[0].name"),
        (ChatRequest, TALK | {"messages": [{"role": "user", "content": "x", "mood": "n"}]}, UnknownParameter, "messages[0].mood"),
        (ChatRequest, TALK | {"messages": [TALK, "x"]}, InvalidRequest, "messages[0].role"),
        (ChatRequest, TALK | {"messages": [{"role": "user", "content": [{"type": "file"}]}]}, InvalidRequest, "messages[0].content"),
        (ChatRequest, TALK | {"max_tokens": 1, "max_completion_tokens": 2}, InvalidRequest, "max_completion_tokens"),
        (ChatRequest, TALK | {"top_logprobs": 2}, InvalidRequest, "top_logprobs"),
        (CompletionRequest, {"model": "m"}, InvalidRequest, "prompt"),
        (CompletionRequest, PROMPT | {"model": ""}, InvalidRequest, "model"),
        (CompletionRequest, PROMPT | {"model": "\ud800"}, InvalidRequest, "model"),
        (CompletionRequest, PROMPT | {"\ud800": 1}, InvalidRequest, None),
        (CompletionRequest, PROMPT | {"moa": 3}, InvalidRequest, "moa"),
        (CompletionRequest, PROMPT | {"cache_salt": "s" * 129}, InvalidRequest, "cache_salt"),
        (CompletionRequest, PROMPT | {"prompt": [1, "a"]}, InvalidRequest, "prompt"),
        (CompletionRequest, PROMPT | {"prompt": [True]}, InvalidRequest, "prompt"),
        (CompletionRequest, PROMPT | {"n": 1.0}, InvalidRequest, "n"),
        (CompletionRequest, PROMPT | {"temperature": 10**4000}, InvalidRequest, "temperature"),
        (TokenizeRequest, {"prompt": "x", "moa": {"revision": "a" * 8}}, InvalidRequest, "moa.revision"),
        (TokenizeRequest, {"messages": TALK["messages"], "add_special_tokens": True}, InvalidRequest, "add_special_tokens"),
    ],
)
def test_a_refusal_names_the_field_as_it_was_written(
    schema: type[Schema], body: Any, kind: type[InvalidRequest], param: str | None
) -> None:
    error = refusal(schema, body)
    assert (type(error), error.param) == (kind, param)


@pytest.mark.case(25)
@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"7", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"\xff", b"{" * 9, b"[" * 10**5, b'{"a":' * 10**5, b'{"a": -Infinity}'],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    assert type(refusal(CompletionRequest, body)) is InvalidJson


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionRequest, PROMPT | {"prompt": [-1] * 400_000}),
        (CompletionRequest, PROMPT | {"prompt": [[]] * 400_000}),
        (CompletionRequest, PROMPT | {"stop": [""] * 400_000}),
        (CompletionRequest, PROMPT | {"stop_token_ids": [-1] * 400_000}),
        (CompletionRequest, PROMPT | {"logit_bias": {str(index): "x" for index in range(100_000)}}),
        (CompletionRequest, PROMPT | {str(index): 1 for index in range(100_000)}),
        (ChatRequest, TALK | {"messages": [1] * 400_000}),
        (ChatRequest, TALK | {"messages": [{"role": "user", "content": [1] * 400_000}]}),
    ],
)
def test_many_mistakes_cost_no_more_than_reading_them(schema: type[Schema], body: Any) -> None:
    """A list of all findings would take seconds of the event loop, for one message."""
    raw = json.dumps(body).encode()
    started = time.process_time()
    json.loads(raw)
    reading = time.process_time() - started
    started = time.process_time()
    refusal(schema, raw)
    assert time.process_time() - started < 15 * reading


NAMES = [*CompletionRequest.model_fields, *ChatRequest.model_fields, "role", "content", "type", "text", "x"]
LEAVES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=8), max_leaves=30
)


@pytest.mark.case(27, 45)
@given(body=ANYTHING)
@settings(max_examples=200, deadline=None)
def test_anything_is_taken_or_refused_by_name(body: Any) -> None:
    """No other exception: it would be a 500."""
    for schema in (CompletionRequest, ChatRequest, TokenizeRequest):
        with suppress(MoaError):
            parse(schema, json.dumps(body).encode())


# -- errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("x"), 400),
        (ContextLengthExceeded("x"), 400),
        (AdapterCorrupt("x"), 400),
        (AdapterNotFound("x"), 404),
        (AdapterExists("x"), 409),
        (AdapterLimit("x"), 507),
        (AdapterMemory("x"), 503),
        (AdapterQuarantined("x"), 503),
        (Overloaded("x"), 503),
        (EngineError("x"), 500),
    ],
)
def test_an_error_has_one_status(error: MoaError, status: int) -> None:
    response = response_of(error)
    assert status_of(error) == response.status_code == status
    body = json.loads(bytes(response.body))["error"]
    assert body == {"message": "x", "type": type_of(status), "param": None, "code": error.code}
    assert ("retry-after" in response.headers) == (status == 503)


def test_an_exception_of_ours_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    response = response_of(KeyError("/etc/passwd"))
    assert response.status_code == 500
    assert b"passwd" not in bytes(response.body)
    assert "passwd" in caplog.text


@pytest.mark.case(25)
def test_json_is_ascii_and_has_no_nan() -> None:
    """A lone surrogate has no UTF-8, and some readers take U+2028 for the end of an event's line."""
    assert dump_json({"a": "\ud800\u2028"}) == b'{"a":"\\ud800\\u2028"}'
    assert error_response(400, "c", "m\ud800" * 1000).body
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"a": float("nan")})
