"""Guided text is what its guide says, costs nobody else anything, and no guide harms the process."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import tokenizers
import torch
from backends import BACKENDS, computing
from families import FAMILIES, TINY, write_base, write_family, write_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from moa_serve import LLM, Guide, SamplingParams
from moa_serve.engine import guide as guide_module
from moa_serve.engine.engine import EngineOptions
from moa_serve.engine.guide import Grammar, GrammarCompiler, Matcher
from moa_serve.engine.request import Request, Sequence
from moa_serve.engine.sampler import Sampler, token_logprobs
from moa_serve.errors import GrammarInvalid, InvalidRequest, Overloaded
from moa_serve.text import Tokenizer

V, EOS = 272, 2  # the last ids have no token: a base's vocabulary is often padded
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5, "pattern": "^[a-z]*$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GUIDES = {
    "json": Guide.json(PERSON),
    "regex": Guide.regex("[a-c]{2,5}(x|yz)"),
    "choice": Guide.choice(['a "quoted" one', "no", "non\n"]),
    "lark": Guide.grammar('start: NUM ("+" NUM){0,5}\nNUM: /[0-9]{1,3}/'),
    "gbnf": Guide.grammar('root ::= "<" [a-z] [a-z]? ">"'),
}


def byte_level() -> tokenizers.Tokenizer:
    symbols = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    backend = tokenizers.Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁a", "é"]
    backend = tokenizers.Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = request.param()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, V, (EOS, 9999))


def token_ids(matcher: Matcher, **wishes: Any) -> list[int]:
    allowed: list[int] = np.flatnonzero(np.unpackbits(matcher.allowed(**wishes), bitorder="little")).tolist()
    return allowed


def walk(grammar: Grammar, seed: int, limit: int = 200) -> list[int]:
    """Tokens as a model might choose them that knows nothing; ends where the grammar ends."""
    random, matcher = np.random.default_rng(seed), grammar.matcher()
    ids: list[int] = []
    while not matcher.is_complete and len(ids) < limit:
        ids.append(int(random.choice(token_ids(matcher))))
        matcher.take(ids[-1])
    assert matcher.error is None
    return ids


def fits(name: str, text: str) -> bool:
    if name == "json":
        return bool(jsonschema_rs.is_valid(PERSON, json.loads(text)))
    if name == "choice":
        return text in json.loads(GUIDES["choice"].source)
    pattern = {"regex": "[a-c]{2,5}(x|yz)", "lark": r"\d{1,3}(\+\d{1,3}){0,5}", "gbnf": "<[a-z]{1,2}>"}[name]
    return re.fullmatch(pattern, text) is not None


# -- guide, grammar, matcher


@pytest.mark.parametrize("name", GUIDES)
def test_every_way_through_a_grammar_is_a_text_that_fits(compiler: GrammarCompiler, tokenizer: Tokenizer, name: str) -> None:
    """In the bytes that clients get, which are ours: where llguidance saw another text, this would show it."""
    grammar = compiler.compile(GUIDES[name])
    for seed in range(20):
        ids = walk(grammar, seed)
        assert all(token < tokenizer.vocab_size for token in ids)
        text = b"".join(tokenizer.token_bytes(token) for token in ids if token != EOS).decode()
        assert fits(name, text), text


def test_tokens_have_the_bytes_that_their_text_has(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    compiler.compile(GUIDES["regex"])
    known = compiler._tokenizer
    assert known is not None
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_bytes(token)
        is_special = token in tokenizer.special_ids or text == b"\xff"  # no text has this byte, with which llguidance marks control tokens
        assert known.is_special_token(token) == is_special
        assert is_special or known.decode_bytes([token]) == text


def test_what_is_certain_is_written_as_a_model_would(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """Else a model is led where it has never been; SentencePiece would also put a space before it."""
    compiler.compile(GUIDES["regex"])
    known = compiler._tokenizer
    assert known is not None
    for text in ("ab", "{", "cab ab", "é", " ab", "<tool>ab"):
        ids = known.tokenize_str(text)
        assert b"".join(tokenizer.token_bytes(token) for token in ids) == text.encode()
    assert len(known.tokenize_str("ab")) == len(known.tokenize_str("<tool>")) == 1


def test_a_tokenizer_that_changes_text_can_be_guided() -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = Tokenizer(backend)
    ids = walk(GrammarCompiler(tokenizer, V, (EOS,)).compile(Guide.choice(["HABE ab"])), seed=0)
    assert tokenizer.decode(ids) == "HABE ab"


def test_text_may_end_only_where_the_grammar_lets_it(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Guide.regex("[0-9]{2,4}")).matcher()
    for length in range(4):
        assert (EOS in token_ids(matcher)) == (length >= 2)
        matcher.take(token_ids(matcher)[-1])
    assert matcher.is_complete


def test_what_is_not_wanted_is_allowed_where_nothing_else_is(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """min_tokens and ignore_eos cannot make a row that has nothing to choose from."""
    digit = {tokenizer.encode(c, parse_special=False, add_special=False)[-1] for c in "01"}
    matcher = compiler.compile(Guide.regex("[01]{1,2}")).matcher()
    first = min(digit)
    assert token_ids(matcher, without=[first]) == sorted(digit - {first})
    matcher.take(first)
    assert token_ids(matcher, may_end=False) == sorted(digit)
    assert token_ids(matcher, without=sorted(digit), may_end=False) == token_ids(matcher) == sorted({EOS} | digit)


def test_a_grammar_is_compiled_once_and_its_matchers_are_apart(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Guide.choice(["ab", "ba"]))
    assert compiler.compile(Guide.choice(["ab", "ba"])) is grammar
    one, other = grammar.matcher(), grammar.matcher()
    before = token_ids(other)
    one.take(before[0])
    assert token_ids(one) != before
    assert token_ids(other) == before


def test_a_token_that_the_grammar_does_not_allow_ends_its_matcher(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Guide.choice(["ab"])).matcher()
    matcher.take(EOS)
    assert isinstance(matcher.error, GrammarInvalid)
    assert not matcher.is_complete


def test_white_space_has_an_end(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    """JSON sets none, and a model that likes white space would go on until it is cut. A schema may allow less."""
    space = tokenizer.encode("\n", parse_special=False, add_special=False)[-1]
    for schema, most in (({"type": "object"}, 40), ({"type": "object", "x-guidance": {"whitespace_flexible": False}}, 0)):
        matcher = compiler.compile(Guide.json(schema)).matcher()
        matcher.take(token_ids(matcher)[0])
        for _ in range(most):
            matcher.take(space)
        assert matcher.error is None
        assert space not in token_ids(matcher)


# -- what is refused


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guide.regex(""),
        lambda: Guide.regex("\ud800"),
        lambda: Guide.regex(7),  # type: ignore[arg-type]
        lambda: Guide.regex("x" * (guide_module.MAX_SOURCE_BYTES + 1)),
        lambda: Guide.choice([]),
        lambda: Guide.choice(["a", ""]),
        lambda: Guide.choice("ab"),
        lambda: Guide.choice(["a", 1]),  # type: ignore[list-item]
        lambda: Guide.choice(["a"] * 1025),
        lambda: Guide.json("{"),
        lambda: Guide.json("[" * 100_000),
        lambda: Guide.json("3"),
        lambda: Guide.json({"const": float("nan")}),
        lambda: Guide.json({"const": {1}}),
        lambda: SamplingParams(guide="[a-z]+"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_guide_is_refused_when_it_is_made(make: Any) -> None:
    with pytest.raises(InvalidRequest, match="guide") as caught:
        make()
    assert caught.value.param == "guide"


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


def chained(count: int, rule: str) -> str:
    return f"start: {rule}0\n" + "\n".join(f"{rule}{i}:{rule}{i + 1}" for i in range(count)) + f'\n{rule}{count}:"a"'


BAD = {
    "brackets": Guide.regex("(" * 60_000),
    "closed brackets": Guide.regex("(" * 60_000 + "a" + ")" * 60_000),
    "a pattern in brackets": Guide.json({"type": "string", "pattern": "(" * 20_000}),
    "deep rules": Guide.grammar("start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "no such rule": Guide.grammar("start: x"),
    "no rule at all": Guide.grammar("::="),
    "a rule of itself": Guide.grammar("start: start"),
    "a term of itself": Guide.grammar('start: A\nA: "a" A'),
    "a file": Guide.grammar("%import /etc/passwd\nstart: X"),
    "another grammar": Guide.grammar("start: @other"),
    "json that is none": Guide.grammar('start: %json {"type":'),
    "nothing": Guide.grammar(r"start: /[^\s\S]/"),
    "a schema of itself": Guide.json({"$ref": "#"}),
    "a schema elsewhere": Guide.json({"$ref": "file:///etc/passwd"}),
    "a schema on the net": Guide.json({"$ref": "http://127.0.0.1:9/"}),
    "nothing at all": Guide.json(False),
    "a deep schema": Guide.json(json.loads(nested(300))),
    "a type that is none": Guide.json({"type": "str"}),
    "what cannot be enforced": Guide.json({"type": "object", "dependentRequired": {"a": ["b"]}}),
    "many remainders": Guide.json({"type": "integer", "multipleOf": 99_999_989}),
    "remainders together": Guide.json({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}),
    "remainders in a grammar": Guide.grammar('start: %json {"\\u006dultipleOf": 99999989}'),
    "small remainders": Guide.json({"type": "number", "multipleOf": 1e-20}),
    "long remainders": Guide.json({"type": "number", "multipleOf": 10**300}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_guide_is_refused_in_words(compiler: GrammarCompiler, name: str) -> None:
    with pytest.raises(GrammarInvalid, match="guide") as caught:
        compiler.compile(BAD[name])
    assert caught.value.param == "guide"
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "guide",
    [
        Guide.grammar(chained(9000, "r")),
        Guide.grammar(chained(9000, "R")),
        Guide.json(
            {"$ref": "#/$defs/0", "$defs": {**{f"{i}": {"allOf": [{"$ref": f"#/$defs/{i + 1}"}]} for i in range(2500)}, "2500": {}}}
        ),
        Guide.regex("((a{1,1000}){1,1000}){1,1000}"),
        Guide.json({"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**6}}),
        Guide.json({"enum": [f"value {i}" for i in range(5000)]}),
    ],
)
def test_a_large_guide_is_followed(compiler: GrammarCompiler, guide: Guide) -> None:
    """Each of these once was too deep for a thread's usual stack, or looks as if it could fill the memory."""
    walk(compiler.compile(guide), seed=0, limit=20)


def test_a_mask_that_takes_too_much_ends_its_row_in_words(compiler: GrammarCompiler) -> None:
    """What a mask may take is counted and not timed, so that it is the same every time."""
    matcher = compiler.compile(Guide.grammar('start: s\ns: s s | s s s | "a" | "b" | /[ab]{1,9}/')).matcher()
    for _ in range(2000):
        if matcher.error is not None:
            break
        matcher.take(token_ids(matcher)[-1])
    assert isinstance(matcher.error, GrammarInvalid)
    assert len(token_ids(matcher)) == len(matcher.allowed()) * 8


def test_a_guide_that_hangs_harms_nobody(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for it gets an answer, others are told to wait, and guides that are known go on."""
    compiler = GrammarCompiler(tokenizer, V, (EOS,))
    known = compiler.compile(GUIDES["choice"])
    end, translated = threading.Event(), guide_module._translated
    monkeypatch.setattr(guide_module, "_translated", lambda guide: (end.wait(), translated(guide))[1])
    monkeypatch.setattr(guide_module, "COMPILE_SECONDS", 0.05)
    for number in range(guide_module.MAX_COMPILING):
        with pytest.raises(GrammarInvalid, match="takes more than"):
            compiler.compile(Guide.regex(f"a{number}"))
    with pytest.raises(Overloaded):
        compiler.compile(Guide.regex("b"))
    assert compiler.compile(GUIDES["choice"]) is known
    end.set()
    monkeypatch.setattr(guide_module, "COMPILE_SECONDS", 5.0)
    compiler.compile(Guide.regex("b"))


def test_a_base_that_cannot_be_guided_says_so(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="no end of text"):
        GrammarCompiler(tokenizer, V, ()).compile(GUIDES["choice"])


# -- the sampler


def guided(grammar: Grammar, guide: Guide, **params: Any) -> Sequence:
    return Sequence(Request([5], SamplingParams(guide=guide, **params), grammar=grammar), [5], b"", (EOS,))


@pytest.mark.parametrize(
    "more", [{"temperature": 0}, {"top_k": 3, "seed": 1}, {"top_p": 0.5, "seed": 1}, {"min_p": 0.1, "seed": 1}, {"seed": 1}]
)
def test_only_what_is_allowed_is_drawn_and_other_rows_do_not_notice(compiler: GrammarCompiler, more: dict[str, Any]) -> None:
    guide = Guide.regex("[0-9]{30}")
    grammar, sampler = compiler.compile(guide), Sampler(V, "cpu")
    params: dict[str, Any] = {"logprobs": 2, "seed": 1, **more}
    edits: dict[str, Any] = {"logit_bias": {7: 5.0}, "repetition_penalty": 1.3}
    for step in range(20):
        logits = torch.randn(5, V, generator=torch.Generator().manual_seed(step)) * 3
        plain = [Sequence(Request([5], SamplingParams(**params)), [5], b"", (EOS,)) for _ in range(2)]
        mixed = [plain[0], guided(grammar, guide, **params), plain[1], guided(grammar, guide, **params, **edits)]
        found = sampler.sample(logits[:4], mixed)
        alone = sampler.sample(logits[[0, 2]], plain)
        assert [found.ids[0], found.ids[2]] == alone.ids
        assert found.logprobs is not None
        assert [found.logprobs[0], found.logprobs[2]] == alone.logprobs
        for row in (1, 3):
            allowed = token_ids(mixed[row].matcher or pytest.fail("no matcher"))
            assert found.ids[row] in allowed
            assert found.logprobs[row] == token_logprobs(logits[[row]], [found.ids[row]], [2])[0]  # of the raw logits
        if params.get("temperature") == 0:
            assert found.ids[1] == max(allowed, key=lambda token: float(logits[1, token]))


def test_what_is_not_finite_is_seen_behind_a_mask(compiler: GrammarCompiler) -> None:
    guide = GUIDES["choice"]
    rows = [guided(compiler.compile(guide), guide, temperature=0) for _ in range(3)]
    logits = torch.zeros(3, V)
    logits[1, 200], logits[2, 201] = torch.nan, torch.inf
    assert Sampler(V, "cpu").sample(logits, rows).is_finite == [True, False, False]


# -- the engine


@pytest.fixture(scope="module", params=BACKENDS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    where = computing(request.param)
    config = TINY | {"vocab_size": V, "eos_token_id": EOS}
    folder = write_base(tmp_path_factory.mktemp("base"), config)
    write_tokenizer(folder)
    adapters = tmp_path_factory.mktemp("adapters")
    named = {family: write_family(adapters / family, family, config=config) for family in FAMILIES}
    options: dict[str, Any] = {"kv_cache_bytes": 2**21, "num_slots": len(FAMILIES)}
    with LLM(folder, adapters=named, **where, dtype="float32", **options) as made:
        yield made


def test_every_adapter_can_be_guided_and_batch_mates_do_not_notice(llm: LLM) -> None:
    """Guided and free rows of every adapter in one batch: the free ones are bit for bit what they are without the others."""
    names: list[str | None] = [None, *FAMILIES]
    free = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
    alone = [llm.generate(["some text"], free, adapter=name)[0] for name in names]
    for guide_name, guide in GUIDES.items():
        params = [free] * len(names) + [SamplingParams(max_tokens=60, guide=guide, seed=1)] * len(names)
        mixed = llm.generate(["some text"] * len(params), params, adapter=names * 2)
        for one, other in zip(alone, mixed, strict=False):
            assert one.token_ids == other.token_ids
            assert llm.backend != "native" or one.logprobs == other.logprobs
        for completion in mixed[len(names) :]:
            assert completion.error is None
            assert completion.finish_reason == "stop"
            assert fits(guide_name, completion.text), completion.text


def test_text_that_has_no_room_is_cut(llm: LLM) -> None:
    (completion,) = llm.generate(["x"], SamplingParams(max_tokens=3, guide=GUIDES["json"]))
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 3)


def test_min_tokens_and_ignore_eos_yield_to_the_end_of_the_text(llm: LLM) -> None:
    for more in ({"min_tokens": 30}, {"ignore_eos": True}):
        params = SamplingParams(max_tokens=40, guide=Guide.regex("[0-9]{2,7}"), seed=3, **more)
        (completion,) = llm.generate(["x"], params)
        assert (completion.finish_reason, len(completion.text)) == ("stop", 7)


def test_a_row_whose_guide_fails_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed matcher is one request's error: nobody else's tokens change, nothing stays behind."""
    free = SamplingParams(temperature=0, max_tokens=8, logprobs=1)
    good = SamplingParams(temperature=0, max_tokens=40, guide=GUIDES["json"])
    bad = SamplingParams(max_tokens=40, guide=Guide.regex("[a-z]{40}"))
    want = llm.generate(["a", "b", "c"], [free, good, bad])[:2]
    allowed, make = Matcher.allowed, Grammar.matcher
    matchers: list[Matcher] = []
    calls: list[Matcher] = []

    def fail(self: Matcher, **wishes: Any) -> Any:
        calls.append(self)
        if self is matchers[0] and calls.count(self) == 3:
            self._matcher.consume_token(EOS)  # which it does not allow: llguidance stays in its error
        return allowed(self, **wishes)

    def note(self: Grammar) -> Matcher:
        matchers.append(make(self))
        return matchers[-1]

    monkeypatch.setattr(Grammar, "matcher", note)
    monkeypatch.setattr(Matcher, "allowed", fail)
    got = llm.generate(["c", "a", "b"], [bad, free, good])
    assert [completion.token_ids for completion in got[1:]] == [completion.token_ids for completion in want]
    assert (got[0].finish_reason, len(got[0].token_ids)) == ("error", 2)
    assert isinstance(got[0].error, GrammarInvalid)
    assert llm._engine.block_pool.num_held == 0


def test_a_guide_outlives_preemption(llm: LLM, tmp_path: Path) -> None:
    """Rows that lose their pages are computed anew, and are where they were in their grammar."""
    assert llm.folder is not None
    params = [SamplingParams(max_tokens=60, guide=Guide.regex("([0-9][a-z]){40}"), seed=seed) for seed in range(4)]
    want = llm.generate(["some text"] * 4, params)
    options: dict[str, Any] = {"kv_cache_bytes": 12 * llm._engine.model.bytes_per_block(EngineOptions().block_size), "max_model_len": 128}
    with LLM(llm.folder, backend=llm.backend, device=llm.device.type, dtype="float32", **options) as small:
        got = small.generate(["some text"] * 4, params)
        assert small._engine.num_preemptions > 0
    assert [completion.token_ids for completion in got] == [completion.token_ids for completion in want]


def test_a_base_without_a_tokenizer_cannot_be_guided(tmp_path: Path) -> None:
    with (
        LLM(write_base(tmp_path), device="cpu", kv_cache_bytes=2**21) as made,
        pytest.raises(InvalidRequest, match="no tokenizer") as caught,
    ):
        made.generate([[5]], SamplingParams(guide=GUIDES["json"]))
    assert caught.value.param == "guide"
