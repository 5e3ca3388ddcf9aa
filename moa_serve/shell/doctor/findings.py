"""What a check says, and how a list of checks is run: one that raises has failed, and the others go on. Knows none of them."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moa_serve.errors import MoaError

Verdict = Literal["ok", "warning", "failed", "skipped"]
Progress = Callable[[str], None]  # gets a line for each part of the work


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is looked at, as the command's arguments have it.

    Args:
        model: the base; None for the default one.
        backend, device: as those of `LLM`.
        is_on_gpu: whether the device is CUDA, asked for or found.
        is_quick: without what takes minutes.
        on_progress: for checks with several parts.
    """

    model: str | None = None
    backend: str = "auto"
    device: str = "auto"
    is_on_gpu: bool = False
    is_quick: bool = False
    on_progress: Progress = lambda _: None


@dataclass(frozen=True, slots=True)
class Finding:
    """
    Args:
        found: one line.
        advice: what to do; "" where all is well.
        details: figures for the report, as JSON has them.
    """

    verdict: Verdict
    found: str
    advice: str = ""
    details: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    look: Callable[[Subject], Finding]


@dataclass(frozen=True, slots=True)
class Checked:
    """A check that was made, and how long it took."""

    name: str
    finding: Finding
    seconds: float = field(compare=False)


def run(checks: Sequence[Check], subject: Subject) -> Iterator[Checked]:
    """Each check in its turn."""
    for check in checks:
        subject.on_progress(check.name)
        start = time.perf_counter()
        try:
            finding = check.look(subject)
        except MoaError as error:  # its message says what to do
            finding = Finding("failed", str(error))
        except Exception as error:  # a doctor that falls over says less than one that tells what it fell over
            finding = Finding("failed", f"{type(error).__name__}: {error}", "report this with the file that --json writes")
        yield Checked(check.name, finding, time.perf_counter() - start)


def trusted(checked: Sequence[Checked]) -> bool:
    return not any(one.finding.verdict == "failed" for one in checked)


def verdict_of(checked: Sequence[Checked]) -> str:
    """One line: whether to trust the installation, and why not."""
    failed = [one.name for one in checked if one.finding.verdict == "failed"]
    if failed:
        return f"do not trust it, because {' and '.join(filter(None, (', '.join(failed[:-1]), failed[-1])))} failed"
    warned = [one.name for one in checked if one.finding.verdict == "warning"]
    return f"trust it, and read what is said of {', '.join(warned)}" if warned else "trust it"
