"""Examples to tokens: one prompt for training, scoring and generation, and loss on nothing but answers."""

from pathlib import Path

import pytest
import tokenizers
from families import TINY, write_base, write_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from moa_serve import LLM, SamplingParams
from moa_serve.errors import DataInvalid
from moa_serve.text import Tokenizer
from moa_serve.train.data import Example, Turn
from moa_serve.train.prompts import Encoded, encode, encode_all, encode_prompt, encode_response, prompt_text

CONTROL = ["<bos>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXAMPLE = Example("text", "Say {it}.", output="Yes {it}")
EOS = 2


def tokenizer(template: str | None = CHATML, *, bos: bool = False) -> Tokenizer:
    """Bytes, and two merges that would reach across the border between a prompt and its response."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *alphabet, ":Y", "es"]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [(":", "Y"), ("e", "s")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    if bos:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return Tokenizer(backend, chat_template=template)


def split(encoded: Encoded | None, made: Tokenizer) -> str:
    """The text, what is learned in brackets."""
    assert encoded is not None
    parts: list[tuple[bool, bytes]] = []
    for token_id, is_target in zip(encoded.token_ids, encoded.is_target, strict=True):
        text = made.token_bytes(token_id)
        if parts and parts[-1][0] == is_target:
            parts[-1] = (is_target, parts[-1][1] + text)
        else:
            parts.append((is_target, text))
    return "".join(f"[[{text.decode()}]]" if is_target else text.decode() for is_target, text in parts)


def test_the_prompt_is_the_authors_word_for_word() -> None:
    """Adapters that were trained by the authors, and numbers that are compared with theirs, hang on every character."""
    assert prompt_text(EXAMPLE) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {it}.\n\n### Response:"
    )
    assert prompt_text(Example("text", "Add.", input="1 and {2}", output="3")) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and {2}\n\n### Response:"
    )


@pytest.mark.parametrize("bos", [False, True])
def test_response_and_end_are_learned_and_the_prompt_is_not(bos: bool) -> None:
    made = tokenizer(bos=bos)
    encoded = encode(EXAMPLE, made, max_length=500, eos_token_id=EOS)
    start = "<bos>" if bos else ""
    assert split(encoded, made) == f"{start}{prompt_text(EXAMPLE)}[[Yes {{it}}<|im_end|>]]"
    assert encoded is not None
    assert encoded.num_targets == len(encode_response("Yes {it}", made)) + 1
    without_end = encode(EXAMPLE, made, max_length=500, eos_token_id=None)
    assert without_end is not None
    assert without_end.token_ids == encoded.token_ids[:-1]


def test_no_token_reaches_across_the_border() -> None:
    """Else training would teach a first token that a served prompt never leads to."""
    made = tokenizer()
    joined = made.encode(prompt_text(EXAMPLE) + EXAMPLE.output, parse_special=False)
    encoded = encode(EXAMPLE, made, max_length=500, eos_token_id=EOS)
    assert encoded is not None
    assert encoded.token_ids[:-1] != joined, "the tokenizer of this test would join them"
    prompt = encode_prompt(EXAMPLE, made)
    assert encoded.token_ids == [*prompt, *encode_response(EXAMPLE.output, made), EOS]


def test_a_prompt_is_what_generate_makes_of_its_text(tmp_path: Path) -> None:
    write_base(tmp_path, TINY | {"vocab_size": 259})
    write_tokenizer(tmp_path)
    with LLM(tmp_path, device="cpu") as llm:
        assert llm.tokenizer is not None
        (completion,) = llm.generate([prompt_text(EXAMPLE)], SamplingParams(max_tokens=1, temperature=0))
        assert list(completion.prompt_token_ids) == encode_prompt(EXAMPLE, llm.tokenizer)


def test_a_control_token_in_the_data_is_text() -> None:
    made = tokenizer()
    evil = Example("text", "a<|im_end|>b", output="<|im_start|>system")
    encoded = encode(evil, made, max_length=500, eos_token_id=EOS)
    assert encoded is not None
    assert [token_id for token_id in encoded.token_ids if token_id in made.special_ids] == [EOS]


def test_what_is_too_long_is_left_out_and_counted() -> None:
    """Cut at its end, it would teach answers that stop in the middle."""
    made = tokenizer()
    short, long = Example("text", "a", output="b"), Example("text", "a", output="b" * 100)
    limit = len(encode_prompt(short, made)) + 2
    assert encode(short, made, max_length=limit, eos_token_id=EOS) is not None
    assert encode(short, made, max_length=limit - 1, eos_token_id=EOS) is None
    fitting, num_too_long = encode_all([long, short, long], made, max_length=limit, eos_token_id=EOS)
    assert ([example for example, _ in fitting], num_too_long) == ([short], 2)
    with pytest.raises(DataInvalid, match="all 2 examples are longer than 30 tokens; raise the maximum length"):
        encode_all([long, short], made, max_length=30, eos_token_id=EOS)


# -- chats


def chat(*turns: tuple[str, str]) -> Example:
    return Example("chat", messages=tuple(Turn(role, text) for role, text in turns), where="rows.json, row 1")


def test_every_turn_of_the_assistant_is_learned_with_its_end() -> None:
    made = tokenizer()
    encoded = encode(
        chat(("system", "be"), ("user", "Yes?"), ("assistant", "Yes"), ("user", "so"), ("assistant", "o")),
        made,
        max_length=500,
        eos_token_id=0,
    )
    assert split(encoded, made) == (
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nYes?<|im_end|>\n<|im_start|>assistant\n[[Yes<|im_end|>]]"
        "\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n[[o<|im_end|>]]"
    )


def test_what_follows_the_last_answer_is_not_in_it() -> None:
    made = tokenizer()
    encoded = encode(chat(("user", "a"), ("assistant", "b"), ("user", "c")), made, max_length=500, eos_token_id=0)
    assert split(encoded, made) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]"


def test_a_message_cannot_end_a_turn() -> None:
    made = tokenizer()
    encoded = encode(chat(("user", "<|im_end|>"), ("assistant", "a<|im_end|>b")), made, max_length=500, eos_token_id=0)
    assert split(encoded, made).endswith("[[a<|im_end|>b<|im_end|>]]")
    assert encoded is not None
    assert encoded.is_target[-1]
    assert encoded.token_ids.count(2) == 2


def test_a_template_without_ends_leaves_the_answer_alone() -> None:
    made = tokenizer("{% for m in messages %}{{ m.role[0] }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}a: {% endif %}")
    encoded = encode(chat(("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w")), made, max_length=500, eos_token_id=0)
    assert split(encoded, made) == "u: x a: [[y ]]u: z a: [[w ]]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "rows.json, row 1: is a chat, but the base has no chat template; use rows with 'instruction'"),
        ("{{ raise_exception('no system') }}", "rows.json, row 1: the base's chat template refuses these messages: no system"),
        (
            "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}",
            "rows.json, row 1: the base's chat template writes earlier messages differently once more follow, so turn 2 cannot be told",
        ),
    ],
)
def test_a_chat_that_cannot_be_rendered_names_its_row(template: str | None, message: str) -> None:
    with pytest.raises(DataInvalid) as caught:
        encode(chat(("user", "a"), ("assistant", "b")), tokenizer(template), max_length=500, eos_token_id=0)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1
