"""Bad adapters, bad requests and bad clients against the real process, case by case of the list of what the server must survive.

Each case has its number: 1 to 24 are adapter files, 25 to 45 requests, 46 to 52 connections. After every one of them the same good
request must get the same answer. Limits and deadlines are small here; that they are what the settings say is other tests' matter.
"""

import concurrent.futures
import gzip
import itertools
import json
import os
import random
import re
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from bad_adapters import Bad, bad_adapters, has_run, params, params_tensors, write_overflowing
from cases import numbered
from hostile import ADMIN, GOOD, USER, WAIT_SECONDS, Answer, Target, bearer, head, request_bytes, under_attack, wait_until
from prometheus_client.parser import text_string_to_metric_families
from servers import TALKING, write_talking_base
from support import random_tensors, tiny_manifest

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.config import ModelConfig
from moa_serve.engine.self_test import trial_prompt

CONTEXT = 4096
BASE: dict[str, Any] = TALKING | {"max_position_embeddings": CONTEXT}
CONFIG = ModelConfig.from_hf(BASE)
MANIFEST = tiny_manifest(CONFIG, "soft_moa", targets=("Q",))
TENSORS = random_tensors(MANIFEST)
ADAPTER_BYTES = sum(4 * tensor.numel() for tensor in TENSORS.values())
BAD = bad_adapters(MANIFEST, TENSORS)
MIB = 2**20
RSS_BYTES, BAD_SIZES_RSS_BYTES = 128 * MIB, 64 * MIB  # that any bad input may cost, and one that lies about sizes


def name_of(bad: Bad) -> str:
    return f"bad{BAD.index(bad)}"


def write_good(folder: Path, scale: float = 1.0) -> Path:
    write_adapter(folder, MANIFEST, {name: scale * tensor for name, tensor in TENSORS.items()})
    return folder


def write_base(folder: Path) -> None:
    write_talking_base(folder)
    (folder / "config.json").write_text(json.dumps(BASE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All folders lie there before the server starts, for it looks at them once a second at most."""
    place = tmp_path_factory.mktemp("bad")
    write_base(place / "base")
    write_good(place / "adapters" / "good")
    for bad in BAD:
        bad.damage(write_good(place / "adapters" / name_of(bad)))
    for name in ("changing", "locked", "replaced", "other"):
        write_good(place / "adapters" / name, scale=1.5)
    (place / "adapters" / "locked" / "adapter.safetensors").chmod(0)
    write_overflowing(place / "adapters" / "overflowing", BASE, overflow_token(), CONTEXT)
    write_both(place / "adapters" / "both")
    write_good(place / "outside")
    (place / "adapters" / "inside").mkdir()
    (place / "adapters" / "inside" / "link").symlink_to(place / "outside")
    return place


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Target]:
    """The server of most cases."""
    deadlines = "--header-timeout-seconds 1 --body-timeout-seconds 1.5 --keep-alive-seconds 1 --write-timeout-seconds 1"
    with under_attack(folder, "--kv-cache-bytes", str(4 * MIB), *deadlines.split()) as target:
        yield target


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server with room for little: one adapter in memory, three names, two rows, a pool below the base's context."""
    place = tmp_path_factory.mktemp("small")
    write_base(place / "base")
    write_good(place / "adapters" / "good")
    write_good(place / "adapters" / "second", scale=2)
    flags = f"--kv-cache-bytes {MIB} --max-num-seqs 2 --max-waiting 60 --max-batch-tokens 64 --max-adapters 3"
    memory = f"--adapter-cache-bytes {ADAPTER_BYTES * 3 // 2} --header-timeout-seconds 1"
    with under_attack(place, *flags.split(), *memory.split()) as target:
        yield target


@pytest.fixture(autouse=True)
def is_well_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did to a server, it serves on as before, with as much memory."""
    targets: list[Target] = [request.getfixturevalue(name) for name in ("server", "small") if name in request.fixturenames]
    before = [target.process.memory_info().rss for target in targets]
    yield
    for target, rss in zip(targets, before, strict=True):
        target.assert_well()
        assert target.process.memory_info().rss - rss <= RSS_BYTES


def test_every_case_has_a_line() -> None:
    """A case that nobody tries is a promise that nobody keeps."""
    tables: list[Any] = [*BAD, *PATHS, *NAMES, *ROWS, *WIRE]
    cases = {row.case for row in tables} | {case for case, _ in (*SHARED, *SMALL)}
    assert cases == {*range(1, 53), 85}


# -- A: adapter files


@pytest.mark.parametrize("bad", numbered(BAD))
def test_a_bad_folder_is_refused_whoever_asks(server: Target, bad: Bad) -> None:
    """By its name in a request, and by an operator's load: nothing is registered, and no code of the file runs."""
    name, before = name_of(bad), server.process.memory_info().rss
    error = server.complete(model=name).assert_error(404, "model_not_found", "model")
    assert ("found but could not be loaded" in error["message"]) == bad.is_listed
    assert bad.says in error["message"] or not bad.is_listed
    status = 404 if bad.error.code == "adapter_not_found" else 400
    param = "lora_path" if bad.param == "path" else bad.param
    error = server.load(name, name).assert_error(status, bad.error.code, param)
    assert bad.says in error["message"]
    assert not has_run(server.adapters / name)
    assert name not in server.models()
    item = server.adapter(name)
    assert (item["state"] if item else None) == ("broken" if bad.is_listed else None)
    server.complete(model=name).assert_error(404, "model_not_found", "model")
    assert bad.case not in (4, 15, 18) or server.process.memory_info().rss - before <= BAD_SIZES_RSS_BYTES


@dataclass(frozen=True)
class Load:
    """What an operator may ask to be loaded, and how it is refused."""

    case: int
    name: str
    lora_name: Any
    lora_path: Any
    code: str
    param: str | None
    status: int = 400

    def __str__(self) -> str:
        return f"{self.case} {self.name}"


def denied(name: str, path: Any) -> Load:
    return Load(17, name, "x", path, "adapter_path_denied", "lora_path")


PATHS = [
    denied("parent", "../outside"),
    denied("parent inside", "good/../good"),
    denied("absolute outside", "/etc"),
    denied("absolute with parent", "/../etc"),
    denied("the directory itself", "."),
    denied("URL", "https://example.com/adapter"),
    denied("file URL", "file:///etc"),
    denied("NUL", "good\0"),
    denied("home", "~/adapter"),
    denied("user's home", "~root"),
    denied("variable", "$HOME"),
    denied("variable inside", "good/$X"),
    denied("through a link", "inside/link"),
    denied("long", "a" * 4000),
    Load(17, "very long", "x", "a" * 5000, "invalid_value", "lora_path"),
    Load(17, "lone surrogate", "x", "\udcff", "invalid_value", "lora_path"),
    Load(17, "number", "x", 5, "invalid_value", "lora_path"),
    Load(13, "missing folder", "x", "nobody", "adapter_not_found", None, 404),
]


def misnamed(name: str, lora_name: Any) -> Load:
    return Load(22, name, lora_name, "good", "adapter_name_invalid", "lora_name")


NAMES = [
    misnamed("the base's", "base"),
    misnamed("65 characters", "a" * 65),
    misnamed("slash", "a/b"),
    misnamed("parent", ".."),
    misnamed("hidden", ".hidden"),
    misnamed("control character", "a\nb"),
    misnamed("NUL", "a\0"),
    misnamed("right to left", "a\u202eb"),
    misnamed("space", "a b"),
    misnamed("not ASCII", "é"),
    misnamed("revision", "good@12345678"),
    misnamed("empty", ""),
    misnamed("lone surrogate", "\ud800"),
    misnamed("number", 5),
    misnamed("list", ["good"]),
    misnamed("null", None),
]


@pytest.mark.parametrize("load", numbered([*PATHS, *NAMES]))
def test_a_bad_load_is_refused(server: Target, load: Load) -> None:
    body = json.dumps({"lora_name": load.lora_name, "lora_path": load.lora_path})  # httpx would not send a lone surrogate
    headers = {"Content-Type": "application/json"}
    answer = server.send("POST", "/v1/load_lora_adapter", key=ADMIN, headers=headers, content=body.encode())
    error = answer.assert_error(load.status, load.code, load.param)
    assert "root:" not in error["message"]
    assert server.adapter(str(load.lora_name)) is None


# -- B: requests


@dataclass(frozen=True)
class Row:
    """A request through httpx, and what comes.

    Args:
        json: the body, as JSON; `content` instead is sent as it is.
        code: None for what is served: status 200.
        has: headers that the answer must have.
    """

    case: int
    name: str
    status: int = 400
    code: str | None = "invalid_value"
    param: str | None = None
    method: str = "POST"
    path: str = "/v1/completions"
    json: Any = None
    content: bytes | None = None
    headers: dict[str, Any] = field(default_factory=dict)
    key: str = USER
    has: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.case} {self.name}"


def status_of(code: str | None) -> int:
    return 200 if code is None else 404 if code == "model_not_found" else 400


def text(case: int, name: str, param: str | None = None, code: str | None = "invalid_value", **body: Any) -> Row:
    """A completion, its other fields good."""
    full = {"model": "good", "prompt": "x", "max_tokens": 1, **body}
    return Row(case, f"completion: {name}", status_of(code), code, param, json=full)


def chat(case: int, name: str, param: str | None = None, code: str | None = "invalid_value", **body: Any) -> Row:
    full = {"model": "good", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **body}
    return Row(case, f"chat: {name}", status_of(code), code, param, path="/v1/chat/completions", json=full)


def raw(case: int, name: str, content: bytes, code: str = "invalid_json", param: str | None = None, status: int = 400) -> Row:
    return Row(case, name, status, code, param, content=content, headers={"Content-Type": "application/json"})


def get(case: int, name: str, path: str, status: int, code: str | None, **more: Any) -> Row:
    return Row(case, name, status, code, method=more.pop("method", "GET"), path=path, **more)


WRONG: dict[str, list[Any]] = {
    "model": [1, "", [], "x" * 257],
    "n": [0, -1, 1.5, "1", True, [1], 10**30],
    "stream": [1, "true", "false"],
    "stream_options": [1, []],
    "temperature": [-0.1, 2.1, "1", True, []],
    "top_p": [0, -1, 1.1, "1"],
    "top_k": [-2, 1.5, "1"],
    "min_p": [-0.1, 1.1, "0"],
    "presence_penalty": [-2.1, 2.1, "1"],
    "frequency_penalty": [-2.1, 2.1, "1"],
    "repetition_penalty": [0, -1, 11, "1"],
    "logit_bias": [1, [], {"1": 101}, {"1": -101}, {"1": "1"}, {"a": 1}, {"-1": 1}, {"1.5": 1}, {"259": 1}],
    "seed": [1.5, "1", 2**64, -(2**63) - 1],
    "stop": [1, "", [1], [""], {}, ["a", None]],
    "stop_token_ids": [1, [-1], ["1"], [1.5], [259]],
    "min_tokens": [-1, "1", 2],
    "ignore_eos": [1, "true"],
    "cache_salt": [1, "", "x" * 129],
    "user": [1, []],
    "store": [1, "true"],
    "metadata": [1, []],
    "moa": [1, []],
}
WRONG_TEXT: dict[str, list[Any]] = {
    "prompt": [1, {}, [], [[]], [1, "a"], ["a", 1], [1.5], [None], True, [[1], []]],
    "max_tokens": ["1", 1.5, True, -1, 0],
    "logprobs": [-1, "1", True, 1.5],
    "echo": [1, "true"],
    "best_of": [0, "1"],
}
WRONG_CHAT: dict[str, list[Any]] = {
    "messages": [1, {}, "hi", []],
    "max_tokens": ["1", 0, -1],
    "max_completion_tokens": [0, "1"],
    "logprobs": [1, "true"],
    "top_logprobs": [-1, "1"],
}


def wrong_fields(make: Callable[..., Row], fields: dict[str, list[Any]]) -> Iterable[Row]:
    for name, values in fields.items():
        for value in values:
            yield make(27, f"{name} {json.dumps(value)[:40]}", name, **{name: value})


UNSUPPORTED = {
    "chat_template": "x", "chat_template_kwargs": {}, "prompt_embeds": "AAAA", "lora_path": "/etc", "guided_whitespace_pattern": " ",
    "logits_processors": ["os.system"], "use_beam_search": True,
}  # fmt: skip
GUIDES: dict[str, tuple[str, Any]] = {
    "60,000 brackets": ("guided_regex", "(" * 60_000),
    "10,000 rules in a chain": ("guided_grammar", "start: a0\n" + "\n".join(f"a{i}:a{i + 1}" for i in range(10_000))),
    "30,000 brackets": ("guided_grammar", "start: " + "(" * 30_000),
    "a file": ("guided_grammar", "%import /etc/passwd\nstart: X"),
    "an address": ("guided_json", {"$ref": "http://127.0.0.1:9/"}),
    "itself": ("guided_json", {"$ref": "#"}),
    "a state for each remainder": ("guided_json", {"type": "integer", "multipleOf": 99_999_989}),
    "nothing": ("guided_json", {"not": {}}),
}
MESSAGES: dict[str, tuple[Any, str]] = {
    "no messages": ([], "messages"),
    "unknown role": ([{"role": "root", "content": "x"}], "messages[0].role"),
    "no role": ([{"content": "x"}], "messages[0].role"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "null content": ([{"role": "user", "content": None}], "messages[0].content"),
    "number as content": ([{"role": "user", "content": 5}], "messages[0].content"),
    "number as a part": ([{"role": "user", "content": [5]}], "messages[0].content"),
    "part with a number as text": ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content"),
    "image": ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "messages[0].content"),
    "string as a message": (["hi"], "messages[0]"),
    "null as a message": ([None], "messages[0]"),
}
DEEP = b"[" * 100_000

ROWS: list[Row] = [
    raw(25, "empty body", b""),
    raw(25, "array", b"[]"),
    raw(25, "null", b"null"),
    raw(25, "string", b'"hi"'),
    raw(25, "broken", b'{"model": "good", '),
    raw(25, "two objects", b"{}{}"),
    raw(25, "100,000 brackets", DEEP),
    raw(25, "100,000 brackets in a field", b'{"model":"good","prompt":' + DEEP),
    raw(25, "100,000 brackets that close", b'{"metadata":{"a":' + DEEP + b"]" * 100_000 + b"}}"),
    raw(25, "6,000 digits", b'{"n":' + b"9" * 6000 + b"}"),
    raw(25, "NaN", b'{"model":"good","prompt":"x","temperature":NaN}'),
    raw(25, "Infinity", b'{"model":"good","prompt":"x","temperature":-Infinity}'),
    raw(25, "1e999", b'{"model":"good","prompt":"x","temperature":1e999}', "invalid_value", "temperature"),
    Row(25, "not said to be JSON", 415, "unsupported_media_type", content=b"{}", headers={"Content-Type": "text/plain"}),
    raw(26, "not UTF-8", b'{"model":"good","prompt":"\xff"}'),
    raw(26, "UTF-16", '{"model":"good","prompt":"x"}'.encode("utf-16")),
    raw(26, "lone surrogate in a prompt", b'{"model":"good","prompt":"\\ud800"}', "invalid_value", "prompt"),
    raw(26, "lone surrogate among prompts", b'{"model":"good","prompt":["a","\\udfff"]}', "invalid_value", "prompt"),
    raw(26, "lone surrogate in a name", b'{"model":"\\ud800","prompt":"x"}', "invalid_value", "model"),
    raw(26, "lone surrogate in a stop string", b'{"model":"good","prompt":"x","stop":["\\ud800"]}', "invalid_value", "stop"),
    replace(raw(26, "lone surrogate to tokenise", b'{"prompt":"\\ud800"}', "invalid_value", "prompt"), path="/tokenize"),
    raw(26, "lone surrogate as a field", b'{"model":"good","prompt":"x","\\ud800":1}', "invalid_value"),
    text(26, "NUL is served", code=None, prompt="a\0b"),
    text(26, "combining marks are served", code=None, prompt="e" + "\u0301" * 500),
    text(26, "emoji are served", code=None, prompt="\U0001f469\u200d\U0001f680", stop=["\U0001f680"]),
    *wrong_fields(text, WRONG | WRONG_TEXT),
    *wrong_fields(chat, WRONG | WRONG_CHAT),
    Row(27, "completion: no model", param="model", json={"prompt": "x"}),
    Row(27, "completion: no prompt", param="prompt", json={"model": "good"}),
    Row(27, "completion: null prompt", param="prompt", json={"model": "good", "prompt": None}),
    Row(27, "chat: no messages", param="messages", path="/v1/chat/completions", json={"model": "good"}),
    Row(27, "tokenize: nothing", param="prompt", path="/tokenize", json={}),
    Row(27, "detokenize: text", param="tokens", path="/detokenize", json={"tokens": "x"}),
    text(28, "n 9", "n", n=9),
    text(28, "best_of 9", "n", n=9, best_of=9),
    text(28, "best_of alone", "best_of", "unsupported_parameter", best_of=9),
    text(28, "n a million", "n", n=10**6),
    text(28, "logprobs 6", "logprobs", logprobs=6),
    text(28, "17 stop strings", "stop", stop=["a"] * 17),
    text(28, "1,025 biases", "logit_bias", logit_bias={str(i): 1 for i in range(1025)}),
    text(28, "1,025 stop tokens", "stop_token_ids", stop_token_ids=[1] * 1025),
    text(28, "65 prompts", "prompt", prompt=["a"] * 65),
    text(28, "more rows than can ever wait", "n", n=8, prompt=["a"] * 64),
    chat(28, "n 9", "n", n=9),
    chat(28, "top_logprobs 21", "top_logprobs", logprobs=True, top_logprobs=21),
    text(28, "many stop strings", "stop", stop=["a"] * 100_000),
    text(29, "max_tokens 0", "max_tokens", max_tokens=0),
    text(29, "max_tokens -1", "max_tokens", max_tokens=-1),
    text(29, "more than the context", "max_tokens", "context_length_exceeded", max_tokens=CONTEXT),
    text(29, "max_tokens of thirty digits", "max_tokens", "context_length_exceeded", max_tokens=10**30),
    text(29, "ids beyond the context", "prompt", "context_length_exceeded", prompt=[5] * (CONTEXT + 1)),
    text(29, "ids that fill the context", "prompt", "context_length_exceeded", prompt=[5] * CONTEXT),
    text(29, "text beyond the context", "prompt", "context_length_exceeded", prompt="x" * (CONTEXT + 1)),
    chat(29, "more than the context", "max_tokens", "context_length_exceeded", max_tokens=CONTEXT),
    text(30, "8 bytes for each place", "prompt", "context_length_exceeded", prompt="x" * (8 * CONTEXT + 1)),
    text(30, "bytes, not characters", "prompt", "context_length_exceeded", prompt="\U0001f680" * (2 * CONTEXT + 1)),
    chat(30, "long message", "messages", "context_length_exceeded", messages=[{"role": "user", "content": "x" * (8 * CONTEXT + 1)}]),
    Row(30, "tokenize: long text", 400, "context_length_exceeded", "prompt", path="/tokenize", json={"prompt": "x" * (8 * CONTEXT + 1)}),
    text(31, "id -1", "prompt", prompt=[5, -1]),
    text(31, "id beyond the vocabulary", "prompt", prompt=[5, 259]),
    text(31, "id 2^63", "prompt", prompt=[2**63]),
    text(31, "id in the second prompt", "prompt", prompt=[[5], [259]]),
    Row(31, "detokenize: id beyond the vocabulary", 400, "invalid_value", "tokens", path="/detokenize", json={"tokens": [259]}),
    Row(31, "detokenize: id -1", 400, "invalid_value", "tokens[0]", path="/detokenize", json={"tokens": [-1]}),
    *(
        Row(35, f"body in {name}", 415, "unsupported_media_type", content=gzip.compress(b"{}"), headers={"Content-Encoding": name})
        for name in ("gzip", "br", "deflate", "zstd", "identity, gzip")
    ),
    get(36, "unknown path", "/v1/nothing", 404, "not_found"),
    get(36, "root", "/", 404, "not_found"),
    get(36, "wrong method", "/v1/completions", 405, "method_not_allowed", has=("allow",)),
    get(36, "DELETE", "/v1/adapters", 405, "method_not_allowed", has=("allow",), method="DELETE", key=ADMIN),
    get(36, "unknown method", "/v1/models", 405, "method_not_allowed", has=("allow",), method="BREW"),
    get(36, "OPTIONS", "/v1/completions", 405, "method_not_allowed", has=("allow",), method="OPTIONS"),
    get(36, "preflight", "/v1/completions", 405, "method_not_allowed", has=("allow",), method="OPTIONS",
        headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}),
    get(36, "page of another origin", "/v1/completions", 403, "origin_denied", method="POST", headers={"Origin": "https://a.example"}),
    text(37, "unknown model", "model", "model_not_found", model="nobody"),
    text(37, "unknown model as a stream", "model", "model_not_found", model="nobody", stream=True),
    chat(37, "unknown model as a stream", "model", "model_not_found", model="nobody", stream=True),
    text(37, "path as a model", "model", "model_not_found", model="../good"),
    get(37, "unknown model in the list", "/v1/models/nobody", 404, "model_not_found", param="model"),
    *(text(38, name, name, "unsupported_parameter", **{name: value}) for name, value in UNSUPPORTED.items()),
    *(chat(38, name, name, "unsupported_parameter", **{name: value}) for name, value in UNSUPPORTED.items()),
    chat(38, "tools", "tools", "unsupported_parameter", tools=[{"type": "function", "function": {"name": "f"}}]),
    chat(38, "answer of a tool", "messages", "unsupported_parameter", messages=[{"role": "tool", "content": "x"}]),
    *(text(38, f"guide: {name}", param, "invalid_grammar", **{param: value}) for name, (param, value) in GUIDES.items()),
    text(38, "unknown name", "temprature", "unknown_parameter", temprature=1),
    text(38, "unknown name within", "moa.colour", "unknown_parameter", moa={"colour": 1}),
    *(chat(39, name, param, messages=messages) for name, (messages, param) in MESSAGES.items()),
    *(
        get(41, name, path, 401, "invalid_api_key", key="", headers=headers, has=("www-authenticate",))
        for name, path, headers in (
            ("no key", "/v1/models", {}),
            ("wrong key", "/v1/models", bearer("wrong")),
            ("empty key", "/v1/models", {"Authorization": "Bearer"}),
            ("key with more behind it", "/v1/models", bearer(USER + "x")),
            ("key cut short", "/v1/models", bearer(USER[:-1])),
            ("wrong scheme", "/v1/models", {"Authorization": f"Basic {USER}"}),
            ("no scheme", "/v1/models", {"Authorization": USER}),
            ("key in the query", f"/v1/models?api_key={USER}", {}),
            ("key in another header", "/v1/models", {"X-Api-Key": USER}),
            ("no key for metrics", "/metrics", {}),
            ("no key for the document", "/openapi.json", {}),
            ("no key for adapters", "/v1/adapters", {}),
        )
    ),
    Row(41, "no key for a completion", 401, "invalid_api_key", json=GOOD, key="", has=("www-authenticate",)),
    Row(41, "no key for a load", 401, "invalid_api_key", path="/v1/load_lora_adapter", json={}, key=""),
    Row(41, "user's key for a load", 403, "admin_key_required", path="/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "good"}),
    Row(42, "trailing slash with a user's key", 403, "admin_key_required", path="/v1/load_lora_adapter/", json={}),
    Row(41, "user's key for an unload", 403, "admin_key_required", path="/v1/unload_lora_adapter", json={"lora_name": "good"}),
    *(get(41, f"public {path}", path, 200, None, key="") for path in ("/health", "/health/live", "/health/ready")),
    *(
        get(42, f"{path} with{'' if key else 'out'} key", path, 404 if key else 401, "not_found" if key else "invalid_api_key", key=key)
        for path in (
            "//v1/models", "/v1//models", "/v1/%2e/models", "/%2e%2e/v1/models", "/v1/models/", "/V1/MODELS", "/v1/models%00",
            "/health/", "/health/%2e%2e/v1/models", "/health;/v1/models", "/v1%2fmodels/",
        )
        for key in ("", USER)
    ),
    *(
        Row(42, f"{path} with a user's key", 404, "not_found", path=path, json={"lora_name": "x", "lora_path": "good"})
        for path in ("//v1/load_lora_adapter", "/v1/%2e/load_lora_adapter", "/V1/load_lora_adapter")
    ),
    *(
        get(44, f"Host {host}", "/health", 421, "misdirected_request", headers={"Host": host})
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "localhost:1@evil", "[::2]", "10.0.0.1")
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", numbered(ROWS))
def test_a_bad_request_is_told_what_is_wrong(server: Target, row: Row) -> None:
    content = row.content if row.json is None else json.dumps(row.json).encode()
    headers = {"Content-Type": "application/json", **row.headers} if content is not None else row.headers
    answer = server.send(row.method, row.path, key=row.key, headers=headers, content=content)
    for name in row.has:
        assert name in answer.headers
    assert "access-control-allow-origin" not in answer.headers
    if row.code is None:
        assert answer.status == row.status, answer.body
        return
    error = answer.error()
    assert (answer.status, error["code"]) == (row.status, row.code), error
    # A wrong element may be named with its place: stop[0], logit_bias.1
    assert row.param is None or error["param"] == row.param or str(error["param"]).startswith((f"{row.param}[", f"{row.param}."))


# -- what httpx would not send


@dataclass(frozen=True)
class Wire:
    """Bytes on a connection, and the error after which it is closed."""

    case: int
    name: str
    code: str
    status: int
    pieces: Callable[[], Iterable[bytes]]

    def __str__(self) -> str:
        return f"{self.case} {self.name}"


POST = "/v1/completions"
CHUNKED = head("POST", POST, "Transfer-Encoding: chunked")


def chunks(size: int, count: int) -> Iterator[bytes]:
    yield CHUNKED
    chunk = b"%x\r\n" % size + b"x" * size + b"\r\n"
    batch = max(1, 65536 // len(chunk))
    for start in range(0, count, batch):
        yield chunk * min(batch, count - start)


def wire(case: int, name: str, code: str, status: int, *pieces: bytes) -> Wire:
    return Wire(case, name, code, status, lambda: pieces)


BODY = json.dumps(GOOD).encode()
WIRE = [
    wire(32, "declared 4 MiB and one", "body_too_large", 413, head("POST", POST, f"Content-Length: {4 * MIB + 1}")),
    wire(32, "declared in 18 digits", "body_too_large", 413, head("POST", POST, f"Content-Length: {'9' * 18}")),
    wire(32, "declared in 4,000 digits", "invalid_http", 400, head("POST", POST, f"Content-Length: {'9' * 4000}")),
    Wire(32, "chunks of 4 MiB and more", "body_too_large", 413, lambda: chunks(65536, 65)),
    Wire(32, "8,193 chunks of a byte", "body_too_large", 413, lambda: chunks(1, 8193)),
    Wire(32, "300,000 chunks of a byte", "body_too_large", 413, lambda: chunks(1, 300_000)),
    wire(33, "header of 20 KB", "headers_too_large", 431, head("GET", "/health", f"X-Large: {'a' * 20_000}")),
    wire(33, "header of 1 MB", "headers_too_large", 431, head("GET", "/health", f"X-Large: {'a' * MIB}")),
    wire(33, "101 headers", "headers_too_large", 431, head("GET", "/health", *(f"X-{i}: 1" for i in range(101)))),
    wire(33, "20,000 headers", "headers_too_large", 431, head("GET", "/health", *(f"X-{i}: 1" for i in range(20_000)))),
    wire(33, "URL of 9 KB", "url_too_long", 414, head("GET", "/health?" + "a" * 9000)),
    wire(34, "no HTTP", "invalid_http", 400, b"nonsense\r\n\r\n"),
    wire(34, "TLS", "invalid_http", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    wire(34, "two lengths", "invalid_http", 400, head("POST", POST, "Content-Length: 1", "Content-Length: 2") + b"x"),
    wire(
        34, "length and chunks", "invalid_http", 400,
        head("POST", POST, "Content-Length: 1", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    ),
    wire(34, "negative length", "invalid_http", 400, head("POST", POST, "Content-Length: -1")),
    wire(34, "length in words", "invalid_http", 400, head("POST", POST, "Content-Length: ten")),
    wire(34, "length with a sign", "invalid_http", 400, head("POST", POST, f"Content-Length: +{len(BODY)}") + BODY),
    wire(34, "bad chunk", "invalid_http", 400, CHUNKED + b"xyz\r\n"),
    wire(34, "negative chunk", "invalid_http", 400, CHUNKED + b"-1\r\n\r\n"),
    wire(34, "other encoding", "invalid_http", 400, head("POST", POST, "Transfer-Encoding: gzip, chunked")),
    wire(34, "header without a name", "invalid_http", 400, head("GET", "/health", ": x")),
    wire(34, "folded header", "invalid_http", 400, head("GET", "/health", "Transfer-Encoding:", "\tchunked")),
    wire(34, "space before the colon", "invalid_http", 400, head("POST", POST, "Content-Length : 5") + b"hello"),
    wire(34, "NUL in a header", "invalid_http", 400, head("GET", "/health", "X-A: a\0b")),
    wire(34, "no Host", "invalid_http", 400, b"GET /health HTTP/1.1\r\n\r\n"),
    wire(34, "two Hosts", "invalid_http", 400, head("GET", "/health", "Host: evil.example")),
    wire(
        42, "path with a dot, no key", "invalid_api_key", 401,
        b"GET /v1/./models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ),
    wire(
        42, "path with two dots, no key", "invalid_api_key", 401,
        b"GET /health/../v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ),
    wire(42, "path with a dot", "not_found", 404, head("GET", "/v1/./models", "Connection: close")),
    wire(42, "URL of another server", "not_found", 404, head("GET", "http://evil.example/v1/models", "Connection: close")),
]  # fmt: skip


@pytest.mark.parametrize("case", numbered(WIRE))
def test_bad_http_is_told_in_the_same_shape_and_closed(server: Target, case: Wire) -> None:
    """What stands behind it on the connection is not taken for a request."""
    said = server.talk(itertools.chain(case.pieces(), [request_bytes(POST, BODY)] if case.case == 34 else []))
    assert len(re.findall(rb"HTTP/1\.1 \d{3} ", said)) == 1
    answer = Answer.read(said)
    assert (answer.status, answer.error()["code"]) == (case.status, case.code)


# -- cases that take more than one request

Scenario = Callable[[Target], None]
SHARED: list[tuple[int, Scenario]] = []
SMALL: list[tuple[int, Scenario]] = []


def scenario(case: int, table: list[tuple[int, Scenario]] = SHARED) -> Callable[[Scenario], Scenario]:
    """Put a function into a table: SHARED ones attack the server of most cases, SMALL ones that with room for little."""

    def add(run: Scenario) -> Scenario:
        table.append((case, run))
        return run

    return add


def scenarios(table: list[tuple[int, Scenario]]) -> list[Any]:
    return [pytest.param(run, marks=pytest.mark.case(case), id=f"{case} {run.__name__}") for case, run in table]


def overflow_token() -> int:
    """A token of which no self-test knows, and that no good request has."""
    return next(token for token in range(3, 250) if token not in trial_prompt(259, CONTEXT))


@scenario(11)
def weights_that_overflow_in_use(server: Target) -> None:
    """The request of the row fails, beside others that do not; after three the adapter is out, until it is loaded again."""
    overflow = {"model": "overflowing", "prompt": [overflow_token()]}
    assert server.complete(model="overflowing", prompt=[trial_prompt(259, CONTEXT)[0]]).status == 200
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        good = [pool.submit(server.assert_well_beside_others) for _ in range(6)]
        failed = [server.complete(**overflow) for _ in range(3)]
        for answer in good:
            answer.result()
    for failure in failed:
        failure.assert_error(500, "adapter_nonfinite_output", None)
    server.complete(**overflow).assert_error(503, "adapter_quarantined", "model")
    server.complete(model="overflowing").assert_error(503, "adapter_quarantined", "model")
    assert server.load("overflowing", "overflowing").status == 200
    assert server.complete(model="overflowing", prompt=[trial_prompt(259, CONTEXT)[0]]).status == 200
    assert server.unload("overflowing").status == 200


def write_both(folder: Path) -> None:
    """Safetensors in the authors' format, and a pickle beside it that nobody may open."""
    folder.mkdir()
    (folder / "adapter_params.json").write_text(json.dumps(params(CONFIG.num_layers)))
    tensors = params_tensors(CONFIG.num_layers, CONFIG.hidden_size)
    (folder / "adapter.safetensors").write_bytes(safetensors.torch.save(tensors))
    os.mkfifo(folder / "adapter.pth")


@scenario(12)
def both_files(server: Target) -> None:
    assert server.complete(model="both").status == 200
    assert server.load("both", "both").status == 200
    (server.adapters / "both" / "adapter.safetensors").write_bytes(b"broken")
    server.load("again", "both").assert_error(400, "adapter_corrupt", None)
    assert server.unload("both").status == 200


@scenario(19)
def unreadable_files(server: Target) -> None:
    """A permission that is mended, like a disk that comes back, needs nothing but another try."""
    if os.access(server.adapters / "locked" / "adapter.safetensors", os.R_OK) and shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to take that from the server")
    error = server.complete(model="locked").assert_error(404, "model_not_found", "model")
    assert "permission" in error["message"].lower()
    server.load("locked", "locked").assert_error(400, "adapter_unreadable", None)
    (server.adapters / "locked" / "adapter.safetensors").chmod(0o644)
    assert server.load("locked", "locked").status == 200
    assert server.complete(model="locked").status == 200
    assert server.unload("locked").status == 200


@scenario(20)
def a_folder_that_is_still_being_copied(server: Target) -> None:
    stop = threading.Event()
    weights = server.adapters / "changing" / "adapter.safetensors"

    def write() -> None:
        for tick in itertools.count():
            if stop.is_set():
                return
            os.utime(weights, ns=(tick, tick))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):  # now and then the server is the faster one
            answer = server.load("changing", "changing", load_inplace=True)
            if answer.status != 200:
                break
        answer.assert_error(409, "adapter_changing", None)
    finally:
        stop.set()
        writer.join()
    assert server.load("changing", "changing", load_inplace=True).status == 200
    assert server.unload("changing").status == 200


@scenario(21)
def files_that_are_replaced_after_the_load(server: Target) -> None:
    """What is served lies in memory of our own: no signal, no other weights, however short the file is now."""
    ask = {**GOOD, "model": "replaced"}
    assert server.load("replaced", "replaced").status == 200
    before = json.loads(server.complete(**ask).body)["choices"]
    place = server.adapters / "replaced" / "adapter.safetensors"
    for damage in (lambda: os.truncate(place, 10), lambda: os.truncate(place, 0), lambda: place.write_bytes(b"x" * 9999), place.unlink):
        damage()
        assert json.loads(server.complete(**ask).body)["choices"] == before
    server.load("replaced", "replaced", load_inplace=True).assert_error(400, "adapter_incomplete", None)
    assert json.loads(server.complete(**ask).body)["choices"] == before
    assert server.unload("replaced").status == 200


@scenario(22)
def a_name_that_is_taken(server: Target) -> None:
    """vLLM's 400, where our own routes would say 409."""
    assert server.load("taken", "other").status == 200
    server.load("taken", "other").assert_error(400, "adapter_exists", "lora_name")
    server.load("taken", "good").assert_error(400, "adapter_exists", "lora_name")
    assert server.unload("taken").status == 200
    server.unload("taken").assert_error(404, "adapter_not_found", "lora_name")


@scenario(36)
def head_is_get(server: Target) -> None:
    for path in ("/health", "/v1/models", "/metrics"):
        answer = server.send("HEAD", path)
        assert (answer.status, answer.body) == (200, b"")
    assert server.send("HEAD", "/v1/nothing").status == 404
    assert server.send("HEAD", "/v1/completions").status == 405


@scenario(37)
def a_long_name_is_not_repeated(server: Target) -> None:
    error = server.complete(model="x" * 200).assert_error(404, "model_not_found", "model")
    assert "x" * 64 in error["message"]
    assert "x" * 65 not in error["message"]


@scenario(40)
def special_tokens_in_a_text(server: Target) -> None:
    """Whoever can write a control token into a prompt speaks with the system's voice."""
    prompt = "<s></s><unk>"
    usage = json.loads(server.complete(model="good", prompt=prompt).body)["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    messages = [{"role": "user", "content": prompt}]
    usage = json.loads(server.post("/v1/chat/completions", model="good", messages=messages, max_tokens=1).body)["usage"]
    assert usage["prompt_tokens"] == 3 + len("user: ") + len(prompt) + len("assistant: ")
    assert json.loads(server.post("/tokenize", prompt=prompt).body)["count"] == len(prompt)
    special = json.loads(server.complete(model="good", prompt=prompt, moa={"parse_special": True}).body)["usage"]
    assert special["prompt_tokens"] == 2 + len("<unk>")


@scenario(43)
def request_ids(server: Target) -> None:
    """It stands in logs and in other systems' headers."""
    for kept in ("a" * 128, "req_1.2-3"):
        assert server.send("GET", "/v1/models", headers={"X-Request-Id": kept}).headers["x-request-id"] == kept
    for replaced in ("a" * 129, "a b", "a\tb", "a;b", '{"x":1}', "é"):
        answer = server.send("GET", "/v1/models", headers={"X-Request-Id": replaced}).headers["x-request-id"]
        assert len(answer) == 32
        assert answer.isalnum()
    for raw_line in (b"X-Request-Id: a\x01b", b"X-Request-Id: a\x7fb", b"X-Request-Id: a\x1b[31m"):
        said = server.talk([b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + raw_line + b"\r\n\r\n"])
        assert raw_line.partition(b": ")[2] not in said
        assert said.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))


@scenario(45)
def two_hundred_damaged_bodies(server: Target) -> None:
    """From a seed, byte by byte; whole requests by their schema are tried in test_fuzz.py."""
    rng = random.Random(45)
    good = [
        json.dumps(body).encode() for body in (GOOD, {"model": "good", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1})
    ]
    for index in range(200):
        which = index % 2
        body = bytearray(good[which])
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(body))
            body[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        path = ("/v1/completions", "/v1/chat/completions")[which]
        answer = server.send("POST", path, headers={"Content-Type": "application/json"}, content=bytes(body))
        assert answer.status in (200, 400, 404), (bytes(body), answer.body)
        if answer.status != 200:
            answer.error()


@scenario(85)
def names_that_clients_make_up(server: Target) -> None:
    """A label that a client chooses is memory that a client fills."""

    def junk(number: int) -> None:
        name = f"junk{number}"
        server.complete(model=name)
        server.send("GET", f"/{name}")
        server.send(name.upper(), "/v1/models")
        server.send("POST", "/v1/completions", key=name)

    def series() -> set[tuple[str, ...]]:
        page = server.send("GET", "/metrics").body.decode()
        return {
            (sample.name, *map("=".join, sorted(sample.labels.items())))
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }

    for number in range(2):
        junk(number)
        series()  # is a request, too, and counted on the next page
    before = series()
    for number in range(2, 102):
        junk(number)
    assert series() == before


# -- C: clients and connections


@scenario(46)
def silent_and_slow_senders(server: Target) -> None:
    """uvicorn would wait for ever; a hundred of them are an outage. Others are served meanwhile."""
    silent = [server.connect() for _ in range(10)]
    half = [server.connect() for _ in range(10)]
    bodies = [server.connect() for _ in range(10)]
    for connection in half:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
    for connection in bodies:
        connection.sendall(head("POST", POST, "Content-Length: 100"))
    waiting = [*silent, *half, *bodies]
    said: dict[socket.socket, bytes] = dict.fromkeys(waiting, b"")
    deadline = time.monotonic() + WAIT_SECONDS
    while waiting:
        assert time.monotonic() < deadline, f"{len(waiting)} are still open"
        for connection in [*waiting]:
            try:
                if connection not in silent:
                    connection.sendall(b"x")  # a byte, and another
                connection.settimeout(0.001)
                data = connection.recv(65536)
                said[connection] += data
                if not data:
                    waiting.remove(connection)
            except TimeoutError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                waiting.remove(connection)
        assert server.ask_good() == server.expected
    for connection in said:
        connection.close()
    assert {said[connection] for connection in (*silent, *half)} == {b""}
    for connection in bodies:
        if said[connection]:  # a byte that comes too late can take the answer away
            Answer.read(said[connection]).assert_error(408, "body_timeout", None)


@scenario(47)
def an_idle_connection_is_closed(server: Target) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = b""
        while data := connection.recv(65536):
            said += data
        assert said.startswith(b"HTTP/1.1 200 ")


@scenario(48)
def readers_that_stop_reading(server: Target) -> None:
    """Their rows pause, then they are cut; what others are served is the same."""
    count, most = 6, 1500
    before = server.metrics()
    ask: dict[str, Any] = {"model": "good", "max_tokens": most, "ignore_eos": True, "stream": True, "logprobs": 5}
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(server.begin(is_narrow=True, **ask))
        wait_until(lambda: server.metrics()["vllm:num_requests_running"] == count)
        server.assert_well_beside_others()
        wait_until(server.is_idle)
        after = server.metrics()
    assert after["moa_requests_total/abort"] - before.get("moa_requests_total/abort", 0) == count
    assert after["moa_generated_tokens_total"] - before["moa_generated_tokens_total"] < count * most / 2


@pytest.mark.parametrize("run", scenarios(SHARED))
def test_case(server: Target, run: Scenario) -> None:
    run(server)


# -- with room for little

LONG: dict[str, Any] = {"max_tokens": 2500, "ignore_eos": True, "temperature": 0}


@scenario(23, SMALL)
def more_adapters_than_allowed(small: Target) -> None:
    assert small.load("first", "good").status == 200
    assert small.load("third", "good").status == 200
    small.load("fourth", "good").assert_error(507, "adapter_limit", None)
    assert "fourth" not in small.models()
    for name in ("first", "third"):
        assert small.unload(name).status == 200


@scenario(24, SMALL)
def no_memory_for_another_adapter(small: Target) -> None:
    """What is in use stays; what is idle makes room."""
    with small.begin(model="good", stream=True, **LONG) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
        small.complete(model="second").assert_error(503, "adapter_memory", None)
        small.load("more", "second").assert_error(503, "adapter_memory", None)
        assert "more" not in small.models()
    wait_until(small.is_idle)
    assert small.complete(model="second").status == 200
    item = small.adapter("good")
    assert item is not None
    assert item["bytes"] == 0
    assert small.complete(model="good").status == 200


@scenario(29, SMALL)
def more_than_the_pool(small: Target) -> None:
    """The base could, but the memory cannot: told at once, not waited for."""
    room = json.loads(small.send("GET", "/version").body)["max_model_len"]
    assert room < CONTEXT
    small.complete(model="good", prompt="x", max_tokens=room).assert_error(400, "context_length_exceeded", "max_tokens")
    small.complete(model="good", prompt=[5] * room, max_tokens=1).assert_error(400, "context_length_exceeded", "prompt")


def assert_freed(small: Target, leave: Callable[[], None], *, count: int) -> None:
    """After `leave` nothing is held, and `count` requests were counted, each once, as cancelled."""
    before = small.metrics()
    leave()
    wait_until(small.is_idle)
    after = small.metrics()
    ended = {name: after[name] - before.get(name, 0) for name in after if name.startswith("moa_requests_total")}
    assert ended["moa_requests_total"] == count
    assert ended.get("moa_requests_total/abort", 0) == count


def running_rows(small: Target) -> tuple[float, float]:
    metrics = small.metrics()
    return metrics["vllm:num_requests_running"], metrics["vllm:num_requests_waiting"]


@scenario(49, SMALL)
def clients_that_leave(small: Target) -> None:
    def while_running(**body: Any) -> None:
        with small.begin(model="good", **LONG, **body):
            wait_until(lambda: running_rows(small)[0] > 0)

    def while_queued() -> None:
        with small.begin(model="good", n=2, **LONG):
            wait_until(lambda: running_rows(small)[0] == 2)
            with small.begin(model="good", **LONG):
                wait_until(lambda: running_rows(small)[1] == 1)
            wait_until(lambda: running_rows(small) == (2, 0))

    def in_the_middle_of_a_stream() -> None:
        with small.begin(model="good", stream=True, **LONG) as connection:
            while b"data:" not in connection.recv(4096):
                pass

    def in_prefill() -> None:
        with small.begin(model="good", prompt=[[index] * 2000 for index in range(40)], max_tokens=1):  # one alone ends within milliseconds
            wait_until(lambda: running_rows(small)[0] > 0)

    def in_the_middle_of_a_body() -> None:
        with small.connect() as connection:
            connection.sendall(head("POST", POST, "Content-Length: 100") + b'{"model"')

    assert_freed(small, while_running, count=1)
    assert_freed(small, lambda: while_running(n=8), count=1)
    assert_freed(small, while_queued, count=2)
    assert_freed(small, in_the_middle_of_a_stream, count=1)
    assert_freed(small, in_prefill, count=1)
    assert_freed(small, in_the_middle_of_a_body, count=0)


@scenario(50, SMALL)
def a_storm_of_clients_that_leave(small: Target) -> None:
    assert small.load("stormy", "good").status == 200

    def storm() -> None:
        connections = [small.begin(model="stormy", stream=index % 2 == 0, **LONG) for index in range(48)]
        wait_until(lambda: sum(running_rows(small)) >= 40)
        for connection in connections:
            connection.close()

    assert_freed(small, storm, count=48)
    assert small.unload("stormy").status == 200


@scenario(51, SMALL)
def idle_connections_up_to_the_limit(small: Target) -> None:
    """New ones wait until the idle ones are closed; then everybody is served again."""
    limits = resource.prlimit(small.process.pid, resource.RLIMIT_NOFILE)
    usual = small.process.num_fds()
    resource.prlimit(small.process.pid, resource.RLIMIT_NOFILE, (usual + 30, limits[1]))
    try:
        with ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(small.connect())
            wait_until(lambda: small.process.num_fds() <= usual)
            assert small.ask_good() == small.expected
    finally:
        resource.prlimit(small.process.pid, resource.RLIMIT_NOFILE, limits)


@scenario(52, SMALL)
def a_request_that_is_sent_again(small: Target) -> None:
    """Its client had no patience. The first is cancelled, the second ends well, and each is counted once."""
    before = small.metrics()
    with small.begin(model="good", **LONG):
        wait_until(lambda: running_rows(small)[0] > 0)
    assert small.complete(model="good", prompt="x", max_tokens=20, temperature=0, ignore_eos=True).status == 200
    wait_until(small.is_idle)
    after = small.metrics()
    assert after["moa_requests_total"] - before["moa_requests_total"] == 2
    assert after["moa_requests_total/abort"] - before.get("moa_requests_total/abort", 0) == 1
    assert after["moa_requests_total/length"] - before["moa_requests_total/length"] == 1


@pytest.mark.parametrize("run", scenarios(SMALL))
def test_case_with_room_for_little(small: Target, run: Scenario) -> None:
    run(small)


@pytest.mark.case(23)
def test_ten_thousand_folders_are_no_obstacle(tmp_path: Path) -> None:
    """The server starts, and looks at them beside its requests."""
    write_base(tmp_path / "base")
    write_good(tmp_path / "adapters" / "good")
    for index in range(9_999):
        place = tmp_path / "adapters" / f"a{index}"
        place.mkdir()
        (place / "adapter.json").write_text("{}")
    try:
        with under_attack(tmp_path) as crowded:
            assert crowded.models() >= {"base", "good"}
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                unknown = [pool.submit(crowded.complete, model="nobody") for _ in range(4)]
                crowded.assert_well()
                for answer in unknown:
                    answer.result().assert_error(404, "model_not_found", "model")
    finally:
        shutil.rmtree(tmp_path / "adapters")
