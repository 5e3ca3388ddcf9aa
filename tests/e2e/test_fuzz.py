"""Requests that schemathesis makes from the server's own OpenAPI document, good ones and bad ones, against the real process.

Few of them in every run, always the same; MOA_FUZZ_EXAMPLES asks for more for each route, and then they are new ones each time.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hostile import Answer
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from servers import Running, running, write_adapters, write_talking_base

EXAMPLES = int(os.environ.get("MOA_FUZZ_EXAMPLES", "0"))
FEW = 60
CONTEXT = 48  # a chat generates up to here where it does not say how much
CHECKS: list[Any] = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_talking_base(folder / "base")
    write_adapters(folder / "adapters", "soft", "sparse_fn")
    with running(folder, "--max-model-len", str(CONTEXT)) as started:
        yield started


def send(case: Any, url: str) -> int:
    """The status of an answer that is one of those that the document tells of."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "soft"  # else hardly any request would come further than to its name
    response = case.call(base_url=url, timeout=60)
    case.validate_response(response, checks=CHECKS)
    answer = Answer(response.status_code, {name.lower(): values[0] for name, values in response.headers.items()}, response.content)
    if answer.status >= 400:
        answer.error()
    elif answer.headers["content-type"] == "application/json":
        assert "detail" not in json.loads(answer.body)
    return answer.status


def fuzz(operation: Any, mode: GenerationMode, url: str) -> Counter[int]:
    statuses: Counter[int] = Counter()

    @settings(max_examples=EXAMPLES or FEW, derandomize=not EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def send_each(case: Any) -> None:
        statuses[send(case, url)] += 1

    send_each()
    return statuses


@pytest.mark.case(45)
def test_no_request_meets_more_than_an_error_of_its_own(server: Running, subtests: pytest.Subtests) -> None:
    """A status of 500 is a bug, whatever was asked, and so is an answer that the document does not tell of."""
    document = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    statuses: dict[str, Counter[int]] = {}
    for result in document.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]
        for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:  # where nothing is sent, nothing is wrong
            with subtests.test(f"{mode.value} {operation.label}"):
                statuses.setdefault(operation.label, Counter()).update(fuzz(operation, mode, server.url))
    for label in ("POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize", "GET /metrics"):
        assert statuses[label][200], "not one request came through"


def test_the_server_is_well_after_all_that(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "soft", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200
    assert server.process.poll() is None
    assert "Traceback" not in server.log_file.read_text()
