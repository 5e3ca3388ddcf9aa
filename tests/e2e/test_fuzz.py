"""Requests that schemathesis makes from the server's own OpenAPI document, good ones and bad ones, against the real process.

Few of them in every run, always the same; `python -m tests.fuzz_http` sends as many as are asked for, and new ones each time.
"""

import random
from collections.abc import Iterator

import pytest
from fuzz_http import KEYS, Fuzzer, assert_well, fuzzing, modes

FEW, BODY, WIRE = 20, 60, 300


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    with fuzzing(tmp_path_factory.mktemp("fuzz")) as started:
        yield started


@pytest.mark.case(45)
def test_no_request_meets_more_than_an_error_of_its_own(fuzzer: Fuzzer, subtests: pytest.Subtests) -> None:
    """A status of 500 is a bug, whatever was asked, and so is an answer that the document does not tell of."""
    for operation in fuzzer.operations:
        for mode in modes(operation):
            with subtests.test(f"{mode.value} {operation.label}"):
                fuzzer.fuzz(operation, mode, BODY if operation.body else FEW, is_new=False)
    statuses = fuzzer.score.by_operation
    assert set(statuses) == {operation.label for operation in fuzzer.operations}
    for label in ("POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize", "GET /metrics"):
        assert statuses[label][200], f"not one request came through: {label}"
    assert set(fuzzer.score.by_client) == set(KEYS)


@pytest.mark.case(34)
def test_damaged_bytes_are_answered_in_words_or_hung_up_on(fuzzer: Fuzzer) -> None:
    rng = random.Random(34)
    before = fuzzer.score.total
    for _ in range(WIRE):
        fuzzer.wire(rng)
    assert fuzzer.score.total == before + WIRE
    assert {200, 400, 401, 404, 415} <= set(fuzzer.score.statuses)


def test_the_server_is_well_after_all_that(fuzzer: Fuzzer) -> None:
    assert_well(fuzzer)
