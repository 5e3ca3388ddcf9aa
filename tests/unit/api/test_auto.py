"""The model `auto`: what it picks, what it says of it, and what it is where it is off."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import write_family
from serving import CONFIG, Serving, start_serving

from moa_serve.adapter.fingerprint import Fingerprint
from moa_serve.api.auto import AutoPicker

PATHS = ("/v1/completions", "/v1/chat/completions")
SUMS, TALK = "3 + 4 = 7 and 12 - 5 = 7", "what is the animal that lives in the sea"


@pytest.fixture(scope="module")
def serving(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("auto")
    for name, family in {"sums": "soft", "talk": "sparse_fn", "auto": "soft"}.items():
        write_family(folder / name, family, config=CONFIG)
    started = start_serving(talker, folder)
    tokenizer = started.server.tokenizer
    assert tokenizer is not None
    texts = {"sums": SUMS, "talk": TALK, "gone": TALK + SUMS}
    prints = {name: Fingerprint.of([tokenizer.encode(text, parse_special=False)]) for name, text in texts.items()}
    started.server.auto = AutoPicker(prints, started.server.registry.is_served)
    yield started
    started.stop()


def body_of(path: str, text: str) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    return body | {"model": "auto", "max_tokens": 2, "temperature": 0}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("text", "name"), [("5 + 6 = 11", "sums"), ("the whale that lives in the sea", "talk")])
def test_the_answer_says_who_gave_it_and_why(serving: Serving, path: str, text: str, name: str) -> None:
    """A client that is told `auto` has answered could never ask the same one again."""
    answer = serving.ok(path, **body_of(path, text))
    assert (answer["model"], answer["moa"]["adapter"]) == (name, name)
    scores = answer["moa"]["auto"]["scores"]
    assert list(scores) == sorted(scores, key=lambda other: -scores[other])
    assert next(iter(scores)) == name
    assert "gone" not in scores
    chunks = serving.events(path, **body_of(path, text))
    assert {chunk["model"] for chunk in chunks} == {name}
    assert chunks[-1]["moa"]["auto"]["scores"] == scores
    named = serving.ok(path, **body_of(path, text) | {"model": name})
    assert named["choices"] == answer["choices"]
    assert "auto" not in named["moa"]
    serving.assert_clean()


def test_it_is_counted_and_listed_and_goes_before_an_adapter_of_its_name(serving: Serving) -> None:
    serving.ok("/v1/completions", **body_of("/v1/completions", "7 - 5 = 2"))
    assert 'moa_auto_picks_total{adapter="sums"}' in serving.get("/metrics").text
    assert serving.metrics.records[-1].model == "auto"
    assert serving.metrics.records[-1].adapter == "sums"
    names = [model["id"] for model in serving.get("/v1/models").json()["data"]]
    assert names == ["tiny", "auto", "sums", "talk"]
    assert serving.get("/v1/models/auto").json()["root"] == "tiny"


def test_the_routing_of_a_prompt_has_it_too(serving: Serving) -> None:
    (data,) = serving.ok("/v1/moa/route", model="auto", prompt="5 + 6 = 11")["data"]
    assert (data["model"], data["adapter"], next(iter(data["auto"]["scores"]))) == ("sums", "sums", "sums")


def test_what_cannot_be_picked_is_refused(serving: Serving) -> None:
    refused = serving.post("/v1/completions", **body_of("x", "x"), moa={"revision": "0" * 12})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "moa.revision")
    picker = serving.server.auto
    serving.server.auto = AutoPicker({"gone": Fingerprint.of([[1]])}, serving.server.registry.is_served)
    try:
        refused = serving.post("/v1/completions", **body_of("x", "x"))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
        assert "gone" in refused.json()["error"]["message"]
        serving.server.auto = None
        answer = serving.ok("/v1/completions", **body_of("x", "x"))
        assert (answer["moa"]["adapter"], "auto" in answer["moa"]) == ("auto", False)  # a name like any other
    finally:
        serving.server.auto = picker
    long = serving.post("/v1/completions", **body_of("x", "x" * 5000))
    assert long.json()["error"]["code"] == "context_length_exceeded"
    serving.assert_clean()
