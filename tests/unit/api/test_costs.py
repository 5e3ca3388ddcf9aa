"""Nothing that a client sends costs more than it is worth: requests that are cheap to write and would be dear to answer."""

from collections.abc import Callable

import pytest
from serving import Serving

from moa_serve.api.generation import _row_seed
from moa_serve.api.schemas import MAX_MESSAGES

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def refusal(serving: Serving, path: str, **body: object) -> tuple[int, str, str | None]:
    response = serving.post(path, model="tiny", **body)
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_a_chat_of_very_many_messages_is_refused(serving: Serving) -> None:
    """125,000 empty messages are 3.6 MB that render to 600,000 tokens."""
    messages = [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)
    assert refusal(serving, CHAT, messages=messages)[:2] == (400, "invalid_value")
    parts = [{"type": "text", "text": ""}] * (MAX_MESSAGES + 1)
    assert refusal(serving, CHAT, messages=[{"role": "user", "content": parts}])[0] == 400


def test_what_the_template_adds_counts_before_it_is_tokenised(start: Callable[..., Serving]) -> None:
    serving = start(max_model_len=64)
    encode = serving.server.tokenizer.encode  # type: ignore[union-attr]
    seen: list[int] = []

    def counting(text: str, **more: bool) -> list[int]:
        seen.append(len(text))
        return encode(text, **more)

    serving.server.tokenizer.encode = counting  # type: ignore[union-attr, method-assign]
    messages = [{"role": "user", "content": "x"}] * 1000
    assert refusal(serving, CHAT, messages=messages)[1] == "context_length_exceeded"
    assert seen == [] or max(seen) <= 8 * serving.server.max_model_len


def test_scoring_a_prompt_many_times_is_refused(serving: Serving) -> None:
    prompt = [5] * (serving.server.max_model_len // 2)
    assert refusal(serving, COMPLETIONS, prompt=[prompt] * 8, n=2, echo=True, logprobs=1, max_tokens=0) == (400, "invalid_value", "echo")


@pytest.mark.parametrize("field", ["max_tokens", "min_tokens", "top_k", "n", "best_of"])
def test_a_number_of_4000_digits_is_a_value_out_of_range(serving: Serving, field: str) -> None:
    """Python refuses to print it, which must not become an error of ours."""
    status, _, param = refusal(serving, COMPLETIONS, prompt="x", **{field: 10**4000})
    assert (status, param) == (400, field)


def test_a_developers_words_are_the_systems(serving: Serving) -> None:
    """OpenAI's newer clients send the role `developer`; templates know `system`."""

    def answer(role: str) -> object:
        messages = [{"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}]
        return serving.ok(CHAT, model="tiny", messages=messages, temperature=0, max_tokens=6)["choices"]

    assert answer("developer") == answer("system")


def test_seeds_of_n_answers_do_not_overlap() -> None:
    """The second answer to seed 1 was once the first one to seed 2."""
    derived = {_row_seed(seed, index) for seed in range(40) for index in range(1, 8)}
    assert len(derived | set(range(40))) == 40 * 8
