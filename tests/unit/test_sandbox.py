"""A stranger's template cannot hold up, fill or read anything: it ends, or it is ended."""

import time
from collections.abc import Iterator

import pytest

from moa_serve.sandbox import MAX_LATE, SandboxProcess, TemplateFailed

GREETING = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"


@pytest.fixture(scope="module")
def process() -> Iterator[SandboxProcess]:
    made = SandboxProcess(max_seconds=1.0)
    yield made
    made.close()


def test_it_renders_as_the_base_does(process: SandboxProcess) -> None:
    messages = [{"role": "user", "content": " h\u00e9\n"}, {"role": "assistant", "content": "x" * 200_000}]
    assert process.render(GREETING, {"messages": messages}) == "<user>h\u00e9<assistant>" + "x" * 200_000


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "unsafe|not callable|immutable"),
        ("{{ range(10 ** 9) | list }}", "[Rr]ange too big"),
        ("{{ 'a' * (2 ** 40) }}", "memory"),
        ("{{ '%999999999999d' % 1 }}", "memory|too"),
        ("{{ 'x' * 5000000 }}", "characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_it_may_not_do_is_told(process: SandboxProcess, source: str, reason: str) -> None:
    with pytest.raises(TemplateFailed, match=reason):
        process.render(source, {"messages": [1]})
    assert process.render("well", {}) == "well"


def test_one_that_does_not_end_is_ended_and_after_some_times_not_tried_again(process: SandboxProcess) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for _ in range(MAX_LATE):
        started = time.monotonic()
        with pytest.raises(TemplateFailed, match="more than 1 s"):
            process.render(endless, {})
        assert time.monotonic() - started < 10
    started = time.monotonic()
    with pytest.raises(TemplateFailed, match="not tried again"):
        process.render(endless, {})
    assert time.monotonic() - started < 0.1
    assert process.render(GREETING, {"messages": []}) == ""
