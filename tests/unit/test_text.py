"""Text and token ids are the same thing in both directions, whole or token by token, whatever a user writes."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from moa_serve.errors import InvalidRequest, ModelCorrupt, ModelUnsupported
from moa_serve.text import IncrementalDecoder, Tokenizer

SPECIAL = ["<s>", "</s>", "<|user|>"]
PIECES = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "é", "he", "▁he"]


def byte_level() -> tokenizers.Tokenizer:
    """Like Llama 3's: 256 bytes, a few merges (one makes a whole Cyrillic letter), BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "he", "Ġhe", "ÐĹ", "ll"]
    merges = [("h", "e"), ("Ġ", "he"), ("Ð", "Ĺ"), ("l", "l")]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_ends(backend)


def sentencepiece() -> tokenizers.Tokenizer:
    """Like Llama 2's: U+2581 for spaces, byte fallback, a space put in front of every text."""
    vocab = {piece: i for i, piece in enumerate(PIECES)}
    merges = [("h", "e"), ("▁", "he")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return with_ends(backend)


def with_ends(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    bos = backend.token_to_id("<s>")
    assert bos is not None
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return backend


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.param())


def pushed(decoder: IncrementalDecoder, ids: list[int]) -> str:
    return "".join(decoder.push([token_id]) for token_id in ids) + decoder.finish()


@given(text=st.text(st.characters(exclude_categories=["Cs"])), parse_special=st.booleans())
@settings(max_examples=100, deadline=None)
def test_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str, parse_special: bool) -> None:
    """NUL, combining marks and emoji are text like any other."""
    if any(token in text for token in SPECIAL):
        parse_special = False
    ids = tokenizer.encode(text, parse_special=parse_special)
    if "▁" not in text:  # SentencePiece writes spaces so, and cannot tell the two apart
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["<s>", "a</s>b", "<|user|>", "<<s>s>", " </s> <s><s>"])
def test_what_a_user_writes_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    """Else a message could end the user's turn and begin the system's."""
    plain = tokenizer.encode(text, parse_special=False)
    assert tokenizer.special_ids.intersection(plain[1:]) == set()
    assert tokenizer.decode(plain) == text
    assert tokenizer.special_ids.intersection(tokenizer.encode(text, parse_special=True)[1:])


def test_the_tokenizers_own_tokens_are_added_on_demand(tokenizer: Tokenizer) -> None:
    """A chat template writes its own BOS; a second one makes answers worse."""
    bos = tokenizer.token_to_id("<s>")
    assert tokenizer.encode("he", parse_special=True)[0] == bos
    assert bos not in tokenizer.encode("he", parse_special=True, add_special=False)
    assert bos not in tokenizer.encode("he", parse_special=False, add_special=False)


def test_a_lone_surrogate_is_the_users_mistake(tokenizer: Tokenizer) -> None:
    """JSON can carry one; it must be a 400 and not a crash."""
    for parse_special in (True, False):
        with pytest.raises(InvalidRequest, match="U\\+D800 at character 2"):
            tokenizer.encode("ab\ud800", parse_special=parse_special)


def test_a_tokens_bytes_are_known(tokenizer: Tokenizer) -> None:
    """Log-probabilities show each token, also where it is a part of a character."""
    ids = tokenizer.encode("he \u0416", parse_special=False)[1:]
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    assert joined.removeprefix(b" ") == "he \u0416".encode()
    end = tokenizer.token_to_id("</s>")
    assert end is not None
    assert (tokenizer.token_text(end), tokenizer.token_bytes(10**6)) == ("</s>", b"")
    assert (
        tokenizer.token_text(next(i for i in ids if len(tokenizer.token_bytes(i)) == 1 and tokenizer.token_bytes(i)[0] >= 0x80)) == "\ufffd"
    )


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_token_by_token_is_the_same_text(data: st.DataObject) -> None:
    """Random ids cut characters anywhere: the stream must add up to what decoding the whole gives."""
    whole = Tokenizer(byte_level())
    ids = data.draw(st.lists(st.integers(0, whole.vocab_size - 1), max_size=40))
    for skip_special in (True, False):
        decoder = IncrementalDecoder(whole, skip_special=skip_special)
        assert pushed(decoder, ids) == whole.decode(ids, skip_special=skip_special)
        assert decoder.num_tokens == len(ids)


def test_a_character_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    """A client that shows half an emoji shows rubbish, and cannot take it back."""
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode("😀", parse_special=False, add_special=False)[-4:]
    assert [decoder.push([token_id]) for token_id in ids] == ["", "", "", "😀"]
    assert decoder.push(ids[:2]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_a_continuation_keeps_its_leading_space() -> None:
    """SentencePiece's decoder drops the first space, which is right for a whole text only: "Hello" + " he" is not "Hellohe"."""
    whole = Tokenizer(sentencepiece())
    ids = whole.encode("he", parse_special=False, add_special=False)
    assert (whole.decode(ids), pushed(IncrementalDecoder(whole), ids)) == ("he", " he")


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(text=st.text("abc", max_size=30), stop=STOPS, cuts=st.lists(st.integers(1, 4)))
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str], cuts: list[int]) -> None:
    """It may begin in one token and end in another; and no token division may change where the text is cut."""
    whole = Tokenizer(byte_level())
    ids = whole.encode(text, parse_special=False, add_special=False)
    decoder, shown, taken, cuts = IncrementalDecoder(whole, stop=stop), "", 0, [*cuts, len(text) + 1]
    for cut in cuts:
        shown += decoder.push(ids[taken : taken + cut])
        taken += cut
        assert text.startswith(shown)
    shown += decoder.finish()
    ends = [(text.find(item) + len(item), -len(item), item) for item in stop if item in text]
    if ends:
        end, length, met = min(ends)
        assert (shown, decoder.stopped, decoder.num_tokens) == (text[: end + length], met, end)  # here a token is a character
    else:
        assert (shown, decoder.stopped, decoder.num_tokens) == (text, None, len(ids))
    assert decoder.num_chars == len(shown)


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    """Held back for longer than needed, a stream stutters; let go too early, the client sees a part of the stop string."""
    whole = Tokenizer(byte_level())
    decoder = IncrementalDecoder(whole, stop=["###", "\n\nUser:"])
    ids = whole.encode("a#b##\n\nUs\n\nUser: x", parse_special=False, add_special=False)
    shown = [decoder.push([token_id]) for token_id in ids]
    assert shown[:6] == ["a", "", "#b", "", "", "##"]
    assert ("".join(shown), decoder.stopped) == ("a#b##\n\nUs", "\n\nUser:")
    assert (decoder.push(ids), decoder.finish()) == ("", "")


def test_what_was_held_back_comes_at_the_end() -> None:
    whole = Tokenizer(byte_level())
    decoder = IncrementalDecoder(whole, stop=["###"])
    assert decoder.push(whole.encode("a##", parse_special=False, add_special=False)) == "a"
    assert decoder.finish() == "##"


def save(folder: Path, backend: tokenizers.Tokenizer, config: object | None = None) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    """Such a base serves token ids."""
    assert Tokenizer.from_folder(tmp_path) is None


def test_a_folder_gives_template_and_special_tokens(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None, "chat_template": "{{ old }}"}
    found = Tokenizer.from_folder(save(tmp_path, byte_level(), config))
    assert found is not None
    assert (found.special_tokens, found.chat_template) == ({"bos_token": "<s>", "eos_token": "</s>"}, "{{ old }}")
    (tmp_path / "chat_template.jinja").write_text("{{ new }}")
    again = Tokenizer.from_folder(tmp_path)
    assert again is not None
    assert again.chat_template == "{{ new }}"


def test_of_several_templates_the_default_one_counts(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "{{ chat }}"}]
    found = Tokenizer.from_folder(save(tmp_path, byte_level(), {"chat_template": templates}))
    assert found is not None
    assert found.chat_template == "{{ chat }}"


def test_truncation_left_over_from_training_is_undone(tmp_path: Path) -> None:
    """Some published files cut every prompt after 512 tokens, silently."""
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    found = Tokenizer.from_folder(save(tmp_path, backend))
    assert found is not None
    for parse_special in (True, False):
        assert len(found.encode("abcdefghijkl", parse_special=parse_special)) == 13


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.json: decoder 'WordPiece'"):
        Tokenizer.from_folder(save(tmp_path, backend))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelCorrupt, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    save(tmp_path, byte_level(), [])
    with pytest.raises(ModelCorrupt, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


def test_text_before_min_tokens_cannot_stop() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("aXbXc", parse_special=False, add_special=False)
    decoder = IncrementalDecoder(tokenizer, stop=["X"], min_tokens=3)
    assert pushed(decoder, ids) == "aXb"
    assert decoder.num_tokens == 4
