"""Examples to tokens: the authors' prompt template or the base's chat template, and which tokens are to be learned.

One definition for training, for scoring and for generation. A response follows the colon of "### Response:" directly, without a space,
as the authors have it. Prompt and response are encoded apart, because a served model meets the prompt's tokens as they are without
a response; a token across the border would never be seen again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from moa_serve.chat_template import ChatTemplate
from moa_serve.errors import DataInvalid, InvalidRequest
from moa_serve.text import Tokenizer
from moa_serve.train.data import Example

# The authors' text, dataset.py of both their lines; LLM-Adapters and Alpaca have the same.
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one example.

    Args:
        is_target: of each token, whether it is to be learned: the response and its end, not the prompt.
    """

    token_ids: list[int]
    is_target: list[bool]

    @property
    def num_targets(self) -> int:
        return sum(self.is_target)


def prompt_text(example: Example) -> str:
    """The prompt of an example that is no chat."""
    template = _WITH_INPUT if example.input else _WITHOUT_INPUT
    return template.format(instruction=example.instruction, input=example.input)


def encode_prompt(example: Example, tokenizer: Tokenizer) -> list[int]:
    """With BOS where the tokenizer puts one; what `LLM.generate` makes of `prompt_text`, but a control token in the data stays text."""
    return tokenizer.encode(prompt_text(example), parse_special=False)


def encode_response(text: str, tokenizer: Tokenizer) -> list[int]:
    """A response, or a choice whose likelihood is wanted, as it follows a prompt; without an end."""
    return tokenizer.encode(text, parse_special=False, add_special=False)


def encode(example: Example, tokenizer: Tokenizer, *, max_length: int, eos_token_id: int | None) -> Encoded | None:
    """Prompt, response and end of text; None where that is longer than `max_length` tokens.

    The authors cut what is too long at its end, which teaches an answer that stops in the middle, or no answer at all to half a
    question. We leave it out and say how many that were.

    Args:
        eos_token_id: what ends a text when it is served; None where the base has no end. A chat's turns end as the template ends them.
    Raises:
        DataInvalid: a chat that the base's template cannot render.
    """
    encoded = _encode_chat(example, tokenizer) if example.kind == "chat" else _encode_response(example, tokenizer, eos_token_id)
    return encoded if len(encoded.token_ids) <= max_length else None


def encode_all(
    examples: Iterable[Example], tokenizer: Tokenizer, *, max_length: int, eos_token_id: int | None
) -> tuple[list[tuple[Example, Encoded]], int]:
    """(examples that fit with their tokens, number of those that are too long and left out).

    Raises:
        DataInvalid: every single one is too long.
    """
    encoded = [(example, encode(example, tokenizer, max_length=max_length, eos_token_id=eos_token_id)) for example in examples]
    fitting = [(example, tokens) for example, tokens in encoded if tokens is not None]
    if encoded and not fitting:
        raise DataInvalid(f"all {len(encoded)} examples are longer than {max_length} tokens; raise the maximum length", param="max_length")
    return fitting, len(encoded) - len(fitting)


def _encode_response(example: Example, tokenizer: Tokenizer, eos_token_id: int | None) -> Encoded:
    prompt = encode_prompt(example, tokenizer)
    response = encode_response(example.output, tokenizer) + ([] if eos_token_id is None else [eos_token_id])
    return Encoded(prompt + response, [False] * len(prompt) + [True] * len(response))


def _encode_chat(example: Example, tokenizer: Tokenizer) -> Encoded:
    """Every turn of the assistant with its end token is learned; what the template writes around it is not.

    A turn is what rendering the chat up to it adds to rendering the question before it. A message cannot make a control token, so the
    first one in there is the template's end of the turn. What follows the last turn is cut off.
    """
    if tokenizer.chat_template is None:
        raise DataInvalid(f"{example.where}: is a chat, but the base has no chat template; use rows with 'instruction'", param="data")
    template, messages = _template(tokenizer), example.messages
    token_ids: list[int] = []
    is_target: list[bool] = []
    try:
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = template.encode(messages[:index], add_generation_prompt=True)
            after = template.encode(messages[: index + 1], add_generation_prompt=False)
            if before[: len(token_ids)] != token_ids or after[: len(before)] != before:
                raise DataInvalid(
                    f"{example.where}: the base's chat template writes earlier messages differently once more follow, "
                    f"so turn {index + 1} cannot be told apart; give it a row of its own",
                    param="data",
                )
            turn = after[len(before) :]
            ends = [place for place, token_id in enumerate(turn) if token_id in tokenizer.special_ids]
            turn = turn[: ends[0] + 1] if ends else turn
            if not turn:
                raise DataInvalid(f"{example.where}: the base's chat template writes nothing for turn {index + 1}", param="data")
            is_target += [False] * (len(before) - len(token_ids)) + [True] * len(turn)
            token_ids = before + turn
    except InvalidRequest as error:
        raise DataInvalid(f"{example.where}: {error}", param="data") from None
    return Encoded(token_ids, is_target)


@lru_cache(maxsize=1)
def _template(tokenizer: Tokenizer) -> ChatTemplate:
    """Compiled once for a base, not once an example."""
    return ChatTemplate(tokenizer)
