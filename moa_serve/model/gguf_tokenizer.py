"""The tokenizer inside a GGUF file as a `tokenizers.Tokenizer`.

The file holds tokens, types and merges or scores, but of the splitting rules only a name (`tokenizer.ggml.pre`); the rules that go
with the names that are served stand here, everything else is refused by name: a tokenizer that splits differently is silently wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from moa_serve.errors import ModelCorrupt, ModelUnsupported

Get = Callable[[str], Any]  # metadata key -> its value, or None
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type
_WORDS = (  # as Llama 3 and Qwen2 publish it; they differ in how many digits make a word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"
_SPLITS = {  # by tokenizer.ggml.pre; None: single digits, then GPT-2's own words
    "smollm": None,
    "llama-bpe": _WORDS.replace("DIGITS", "{1,3}"),
    "qwen2": _WORDS.replace("DIGITS", ""),
}


def build_tokenizer(get: Get, path: Path) -> Tokenizer:
    """Build it from the metadata.

    Args:
        path: of the GGUF file, for messages.
    Raises:
        ModelUnsupported: names `tokenizer.ggml.model` or `tokenizer.ggml.pre`.
        ModelCorrupt: the lists do not fit each other.
    """
    kind, pre = get("tokenizer.ggml.model"), get("tokenizer.ggml.pre")
    tokens, types = get("tokenizer.ggml.tokens") or [], get("tokenizer.ggml.token_type") or []
    if not tokens or len(types) != len(tokens):
        raise ModelCorrupt(f"{path}: tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    if kind != "llama" and not (kind == "gpt2" and pre in _SPLITS):
        key = "tokenizer.ggml.pre" if kind == "gpt2" else "tokenizer.ggml.model"
        raise ModelUnsupported(
            f"{path}: {key} {get(key)!r} is not served; served are gpt2 with {', '.join(_SPLITS)}, and llama; "
            f"use the model's Hugging Face folder instead",
            param=key,
        )
    try:
        tokenizer = _sentencepiece(get, tokens, types) if kind == "llama" else _byte_level(get, tokens, pre)
        tokenizer.post_processor = _ends(get, tokens)
    except Exception as error:  # the library raises Exception itself
        raise ModelCorrupt(f"{path}: its tokenizer does not fit together ({error}); fetch it again") from None
    marked = [
        AddedToken(token, special=type_ != _USER_DEFINED, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in marked if token.special])
    tokenizer.add_tokens([token for token in marked if not token.special])
    return tokenizer


def tokenizer_config(get: Get) -> dict[str, Any]:
    """`tokenizer_config.json`: the names of the special tokens, and the chat template."""
    tokens = get("tokenizer.ggml.tokens")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = get(f"tokenizer.ggml.{theirs}_token_id")
        if index is not None and index < len(tokens):
            config[f"{ours}_token"] = tokens[index]
    if template := get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _byte_level(get: Get, tokens: list[str], pre: str) -> Tokenizer:
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in get("tokenizer.ggml.merges") or [])]
    # Llama 3 takes a word that is a token whole, even where its merges would not lead there
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs, ignore_merges=pre == "llama-bpe"))
    pattern = _SPLITS[pre]
    first = pre_tokenizers.Digits(individual_digits=True) if pattern is None else pre_tokenizers.Split(Regex(pattern), "isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, words])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(get: Get, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE: what is merged next is the pair whose whole has the greatest score; unknown characters fall back to bytes."""
    scores = get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    normal = {token: i for token, i in ids.items() if types[i] == _NORMAL}  # others are never the result of a merge: "</s>" stays text
    ranked = [
        ((-scores[i], ids[token[:cut]], ids[token[cut:]]), (token[:cut], token[cut:]))
        for token, i in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    merges = [pair for _, pair in sorted(ranked)]
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == _UNKNOWN), None)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = get("tokenizer.ggml.add_space_prefix") is not False
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def _ends(get: Get, tokens: list[str]) -> Any:
    """What is put before and after every text, as the metadata says; SentencePiece models and Llama 3 begin with BOS by default."""
    default = {"bos": get("tokenizer.ggml.model") == "llama" or get("tokenizer.ggml.pre") == "llama-bpe", "eos": False}
    ids = {}
    for end in ("bos", "eos"):
        wanted = get(f"tokenizer.ggml.add_{end}_token")
        if default[end] if wanted is None else wanted:
            ids[end] = get(f"tokenizer.ggml.{end}_token_id")
    if any(index is None or index >= len(tokens) for index in ids.values()):
        raise ValueError(f"{' and '.join(ids)} is to be added, but has no id")
    names = {end: tokens[index] for end, index in ids.items()}
    single = [*([names["bos"]] if "bos" in names else []), "$A", *([names["eos"]] if "eos" in names else [])]
    return processors.TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=[(names[end], ids[end]) for end in ids])
