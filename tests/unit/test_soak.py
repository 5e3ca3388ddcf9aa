"""The soak's judge must notice every lie: one that is content with anything would pass a server that loses requests."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from agreement import Check, Scrape, check_routers, memory_is_flat, reconcile, reconcile_log
from storm import Storm, Windows, slope_mib_per_minute
from traffic import Client, Entry, Job, Ledger, Mix, Outcome, bad_jobs

JOB = Job("base", None, "/v1/completions", b"", max_tokens=8, max_prompt_tokens=20)
EMPTY = Scrape("")

PAGE = {
    'moa_requests_total{adapter="base",finish_reason="length"}': 1,
    'moa_requests_total{adapter="base",finish_reason="abort"}': 1,
    'moa_requests_total{adapter="other",finish_reason="error"}': 1,
    'moa_prompt_tokens_total{adapter="base"}': 5 + 6,
    'moa_generated_tokens_total{adapter="base"}': 8 + 4,
    'vllm:prompt_tokens_total{model_name="base",engine="0"}': 11,
    'vllm:generation_tokens_total{model_name="base",engine="0"}': 12,
    'moa_http_responses_total{status="200"}': 2,
    'moa_http_responses_total{status="400"}': 1,
    "moa_requests_running": 0,
    'moa_router_tokens_total{adapter="a",layer="0"}': 4,
    'moa_expert_selected_total{adapter="a",layer="0",expert="Q"}': 3,
    'moa_expert_computed_total{adapter="a",layer="0",expert="Q"}': 4,
    'moa_expert_weight_total{adapter="a",layer="0",expert="Q"}': 1.5,
    'moa_experts_per_token_sum{adapter="a"}': 3,
    'moa_experts_per_token_count{adapter="a"}': 4,
    'moa_expert_evaluations_total{adapter="a"}': 4,
    'moa_expert_evaluations_skipped_total{adapter="a"}': 0,
}


def scrape(**changes: float) -> Scrape:
    return Scrape("".join(f"{name} {value}\n" for name, value in (PAGE | changes).items()))


def ledger() -> Ledger:
    """One finished, one cancelled after three tokens, one refused."""
    book = Ledger()
    ok, left, refused = (book.begin(JOB, name) for name in ("ok", "left", "refused"))
    for entry, status in ((ok, 200), (left, 200), (refused, 400)):
        entry.is_sent, entry.status = True, status
        book.statuses[status] += 1
    ok.finish_reason, ok.prompt_tokens, ok.generated_tokens = "length", 5, 8
    left.prompt_tokens, left.generated_tokens = 6, 3
    for entry, outcome in ((ok, Outcome.OK), (left, Outcome.CANCELLED), (refused, Outcome.REFUSED)):
        book.end(entry, outcome)
    return book


def wrong(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.is_met]


def test_what_agrees_is_accepted() -> None:
    assert wrong(reconcile(ledger(), EMPTY, scrape(), ["base", "a"])) == []


@pytest.mark.parametrize(
    ("series", "value"),
    [
        ('moa_requests_total{adapter="base",finish_reason="length"}', 0),
        ('moa_requests_total{adapter="base",finish_reason="abort"}', 0),
        ('moa_requests_total{adapter="base",finish_reason="abort"}', 2),
        ('moa_requests_total{adapter="other",finish_reason="error"}', 2),
        ('moa_prompt_tokens_total{adapter="base"}', 12),
        ('moa_generated_tokens_total{adapter="base"}', 10),
        ('moa_generated_tokens_total{adapter="base"}', 17),
        ('moa_generated_tokens_total{adapter="stray"}', 1),
        ('vllm:generation_tokens_total{model_name="base",engine="0"}', 11),
        ('vllm:prompt_tokens_cached_total{model_name="base",engine="0"}', 16),
        ('moa_http_responses_total{status="200"}', 1),
        ('moa_http_responses_total{status="400"}', 2),
        ("moa_requests_running", 1),
        ('moa_router_tokens_total{adapter="base",layer="0"}', 11),
        ('moa_expert_selected_total{adapter="a",layer="0",expert="Q"}', 5),
        ('moa_expert_weight_total{adapter="a",layer="0",expert="Q"}', 3.1),
        ('moa_experts_per_token_sum{adapter="a"}', 2),
        ('moa_expert_evaluations_skipped_total{adapter="a"}', 1),
    ],
)
def test_one_number_that_is_off_is_noticed(series: str, value: float) -> None:
    assert wrong(reconcile(ledger(), EMPTY, scrape(**{series: value}), ["base", "a"]))


def test_what_was_counted_before_is_not_counted_again() -> None:
    """A soak of a server that has run for a while must not take its past for its own."""
    doubled = {name: 2 * value for name, value in PAGE.items() if "_total{" in name and "router" not in name and "expert" not in name}
    assert wrong(reconcile(ledger(), scrape(), scrape(**doubled), ["base", "a"])) == []


def test_a_request_that_failed_or_never_ended_is_noticed() -> None:
    failed, open_ended = ledger(), ledger()
    failed.end(failed.begin(JOB, "failed"), Outcome.ERROR, "boom")
    open_ended.begin(JOB, "open")
    for book in (failed, open_ended):
        assert wrong(reconcile(book, EMPTY, scrape(), ["base", "a"])) == ["every request ends once, none in an error"]
    with pytest.raises(AssertionError):
        failed.end(failed.entries[0], Outcome.OK)


def test_a_request_that_was_never_sent_is_not_asked_for() -> None:
    """A client that leaves before its connection stands is nothing that a server could count."""
    book = ledger()
    book.end(book.begin(JOB, "unsent"), Outcome.CANCELLED)
    assert wrong(reconcile(book, EMPTY, scrape(), ["base", "a"])) == []


def line(entry: Entry, **changes: Any) -> dict[str, Any]:
    told = {"event": "request", "request_id": entry.request_id, "status": entry.status, "adapter": None, "level": "info"}
    told |= {"finish_reason": entry.finish_reason, "prompt_tokens": entry.prompt_tokens, "completion_tokens": entry.generated_tokens}
    told |= {"cached_tokens": entry.cached_tokens}
    return told | changes


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[0]],
        lambda lines: [*lines, lines[0] | {"request_id": "stray"}],
        lambda lines: [lines[0] | {"completion_tokens": 7}, *lines[1:]],
        lambda lines: [lines[0] | {"cached_tokens": 16}, *lines[1:]],
        lambda lines: [*lines, {"level": "warning", "message": "a step failed"}],
    ],
)
def test_a_log_that_differs_is_noticed(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    book = ledger()
    lines = [line(entry) for entry in book.entries]
    assert wrong(reconcile_log(book, lines)) == []
    assert wrong(reconcile_log(book, change(lines)))


def test_memory_that_grows_is_noticed() -> None:
    assert memory_is_flat([1, 5, *[10] * 18], 600).is_met
    assert not memory_is_flat(range(100, 200), 600).is_met
    assert not memory_is_flat([1, 1, 1], 600).is_met
    short = memory_is_flat(range(100, 200), 60)
    assert short.is_met
    assert "not judged" in short.detail


def test_routers_agree_on_a_page_without_any() -> None:
    assert wrong(check_routers(EMPTY)) == []


def test_equal_seeds_draw_equal_traffic_of_every_kind() -> None:
    """A run that went wrong can be had again."""
    names = ["base", "one", "two"]
    first, second = ([mix.draw() for _ in range(400)] for mix in (Mix(names, 3), Mix(names, 3)))
    assert first == second
    counts = [sum(job.model == name for job in first) for name in names]
    assert counts == sorted(counts, reverse=True)
    assert any(job.leave_events for job in first)
    assert any(job.leave_seconds for job in first)
    assert {job.expected for job in first} == {200, 400, 404, 415}
    assert len({job.content for job in bad_jobs("base", None)}) == 11


def test_an_error_is_explained_by_a_fault_of_its_time_and_code_only() -> None:
    windows = Windows()
    before, code = Entry(JOB, "before"), "internal_error"
    assert not windows.is_planned(before, code)
    close = windows.open(code)
    assert windows.is_planned(before, code)
    assert not windows.is_planned(before, "model_not_found")
    close()
    assert windows.is_planned(before, code)
    assert not windows.is_planned(Entry(JOB, "after", begun=time.monotonic() + 1), code)


@pytest.mark.parametrize(
    "change", [{"text": "ab"}, {"logprobs": [-1.0, -2.001]}, {"logprobs": [-1.0]}, {"logprobs": [-1.0, -2.0, -3.0]}, {"revision": "r2"}]
)
@pytest.mark.parametrize(("backend", "is_equal"), [("torch", False), ("native", True)])
def test_an_answer_that_is_not_the_one_given_alone_is_noticed(tmp_path: Path, change: dict[str, Any], backend: str, is_equal: bool) -> None:
    client, http = Client("http://nobody", Ledger()), httpx.AsyncClient(verify=False)
    storm = Storm("", tmp_path, tmp_path, psutil.Process(), client, http, client, random.Random(0), Windows(), backend)
    storm.golden["r1", "x"] = ("abc", [-1.0, -2.0])
    good: dict[str, Any] = {"outcome": Outcome.OK, "text": "abc", "logprobs": [-1.0, -2.0 if is_equal else -2.0 + 1e-6], "revision": "r1"}
    storm.check(Entry(JOB, "good", **good), "x")
    assert (storm.wrong, storm.num_golden.total()) == ([], 1)
    storm.check(Entry(JOB, "bad", **(good | change)), "x")
    assert (len(storm.wrong), storm.num_golden.total()) == (1, 1)


def test_the_slope_of_memory_is_in_mebibytes_a_minute() -> None:
    grows = [(float(second), 2**30 + second * 2**20 / 30) for second in range(400)]
    assert slope_mib_per_minute(grows) == pytest.approx(2)
    assert slope_mib_per_minute([(float(second), 2.0**30) for second in range(400)]) == 0
