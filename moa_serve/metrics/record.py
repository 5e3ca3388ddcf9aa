"""RequestRecord: what is known of one request when it has ended. No prompt, no text, no key: it is counted, logged and answered with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One HTTP request. Times are seconds of `time.monotonic()`; None where it did not come so far.

    Args:
        model: the name that was asked for, as the client wrote it.
        adapter: the adapter it named; None is the base, or nothing that is known.
        prompt_tokens, completion_tokens, cached_tokens: of all its prompts and completions together.
        longest_completion: tokens of its longest completion.
        finish_reason: stop, length, abort (the client left) or error.
        arrived: the request was complete. scheduled: its first row began. first_token: of its first row. finished: its last byte was made.
        n: completions of each prompt.
        max_tokens: as asked; None is the rest of the context.
        status: of the HTTP response; what was decided, where the client left before it.
        threshold_scale: what the server, under pressure, multiplied the adapter's thresholds by; None where it left them alone.
    """

    model: str
    adapter: str | None
    revision: str | None
    request_id: str
    endpoint: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    longest_completion: int
    finish_reason: str
    arrived: float
    scheduled: float | None
    first_token: float | None
    finished: float
    n: int
    max_tokens: int | None
    status: int
    threshold_scale: float | None = None


def timings(record: RequestRecord) -> dict[str, float | None]:
    """`moa.timings` of a response: seconds, to the microsecond; None for what did not happen.

    queue: arrival to the first row. prefill: from there to the first token. first_token: arrival to the first token (TTFT).
    decode: first token to the end. tokens_per_second: of decoding, without the first tokens, which prefill made.
    """
    decode = _span(record.first_token, record.finished)
    later_tokens = record.completion_tokens - record.n
    return {
        "queue": _span(record.arrived, record.scheduled),
        "prefill": _span(record.scheduled, record.first_token),
        "first_token": _span(record.arrived, record.first_token),
        "decode": decode,
        "tokens_per_second": round(later_tokens / decode, 3) if decode and later_tokens > 0 else None,
    }


def _span(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(max(0.0, end - start), 6)
