"""Tokenizers as GGUF files hold them: vocabulary, merges or scores, special tokens and chat templates."""

import base64
import json
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .gguf_pre_tokenizers import choose, encode, rule_of, variant

SPACE = "▁"  # what SentencePiece writes for a space
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TO_MARKED_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
WITHOUT_TOKEN = "[PAD{}]"  # llama.cpp's name of an embedding row without a token


class Kind(NamedTuple):
    """
    What llama.cpp needs to tokenize.

    Args:
        model: value of `tokenizer.ggml.model`.
        keys: method of `GGUFWriter` -> its argument.
        tokenizer: one that does what llama.cpp will do.
        scores: score by token, where llama.cpp merges or chooses by score.
        has_bytes: whether `<0x41>` stands for a byte.
        notes: what llama.cpp will do in another way.
    """

    model: str
    keys: dict[str, Any]
    tokenizer: Tokenizer
    scores: dict[str, float] | None = None
    has_bytes: bool = False
    notes: tuple[str, ...] = ()


def kind_of(backend: Tokenizer) -> Kind:
    """
    How llama.cpp can do what a tokenizer does.

    Raises:
        InputError: it cannot.
    """
    definition = json.loads(backend.to_str())
    model, text = definition["model"], json.dumps(definition)
    if model["type"] == "BPE" and '"ByteLevel"' in text:
        return _byte_level(backend, definition)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return _sentencepiece(backend, definition)
    if model["type"] == "Unigram" and not model.get("byte_fallback"):
        return _unigram(backend, definition)
    fallback = " with byte fallback" if model.get("byte_fallback") else ""
    raise InputError(
        "GGUF export needs a byte-level BPE tokenizer, a BPE tokenizer with byte fallback, or a Unigram one without; this "
        f"one is {model['type']}{fallback}."
    )


def _byte_level(backend: Tokenizer, definition: dict[str, Any]) -> Kind:
    rule, is_exact = rule_of(backend)
    keys = {"tokenizer_pre": rule.name, "token_merges": merges_of(definition)}
    notes = []
    if not is_exact:
        notes.append(
            f"llama.cpp's pre-tokenizer {rule.name} follows this tokenizer for most texts, not for all (words with letters "
            "that are not ASCII, combining marks, unusual white space)"
        )
    if definition["normalizer"] is not None:
        notes.append("llama.cpp does not normalize texts: give it Unicode's form C")
    return Kind("gpt2", keys, rule.applied_to(definition), notes=tuple(notes))


def merges_of(definition: dict[str, Any]) -> list[str]:
    """Merges as "left right". There is one of two empty strings if there is none: llama.cpp needs the list."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in definition["model"]["merges"]]
    return merges or [""]


def scores_of(definition: dict[str, Any]) -> dict[str, float]:
    """A score for each token: minus the rank of the first merge that makes it; of others, less than all of these."""
    merges = definition["model"]["merges"]
    scores = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), float(-rank))
    return {token: scores.get(token, float(-len(merges))) for token in definition["model"]["vocab"]}


def merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, best score first: what SentencePiece and llama.cpp merge."""
    pairs = [
        (score, token[:cut], token[cut:])
        for token, score in scores.items()
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return [(left, right) for _, left, right in sorted(pairs, key=lambda pair: -pair[0])]


def _sentencepiece(backend: Tokenizer, definition: dict[str, Any]) -> Kind:
    missing = [token for token in BYTES if token not in definition["model"]["vocab"]]
    if missing:
        raise InputError(f"GGUF export: the tokenizer falls back to bytes, but has no token {missing[0]}.")
    scores = scores_of(definition)
    merges = merges_by_score(scores)

    def by_score(has_prefix: bool) -> Tokenizer:
        return variant(definition, {"merges": merges}, normalizer=_marking(has_prefix))

    has_prefix = choose((False, True), by_score, backend, strip=" ")
    if has_prefix is not None:
        return Kind("llama", {"add_space_prefix": has_prefix}, by_score(has_prefix), scores, has_bytes=True)

    # llama.cpp's byte-pair encoding on characters takes the merges as they are, without a space in front of the text
    split = {"type": "Split", "pattern": {"Regex": r"[^\n]+|[\n]+"}, "behavior": "Isolated", "invert": False}
    by_merges = variant(definition, normalizer=TO_MARKED_SPACES, pre_tokenizer=split)
    if choose((by_merges,), lambda tokenizer: tokenizer, backend, strip=" "):
        keys = {"tokenizer_pre": "sarvam-moe", "token_merges": merges_of(definition)}
        return Kind("gpt2", keys, by_merges, has_bytes=True)
    raise InputError(
        "GGUF export: llama.cpp merges any two tokens that make a third (as SentencePiece does), or takes merges as they "
        "are if no space is put in front of a text and none of them crosses a line's end; this BPE tokenizer with byte "
        "fallback does neither."
    )


def _marking(has_prefix: bool, before: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """A normalizer: a space in front if `has_prefix`, and spaces marked."""
    prefix = [{"type": "Prepend", "prepend": SPACE}] if has_prefix else []
    return {"type": "Sequence", "normalizers": [*before, *prefix, TO_MARKED_SPACES]}


def _unigram(backend: Tokenizer, definition: dict[str, Any]) -> Kind:
    steps = definition["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = steps.get("normalizers", [steps])
    charsmap = tuple(step for step in steps if step["type"] == "Precompiled")
    squeezing = (
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        {"type": "Strip", "strip_left": True, "strip_right": True},
    )

    def build(option: tuple[bool, bool]) -> Tokenizer:
        has_prefix, squeezes = option
        return variant(definition, normalizer=_marking(has_prefix, charsmap + squeezing * squeezes))

    option = choose([(a, b) for b in (False, True) for a in (True, False)], build, backend, strip=" ")
    if option is None or len(charsmap) > 1:
        raise InputError(
            "GGUF export: llama.cpp has no Unigram tokenizer that normalizes and splits as this one does."
        )
    keys = {"add_space_prefix": option[0], "remove_extra_whitespaces": option[1]}
    if charsmap:
        keys["precompiled_charsmap"] = base64.b64decode(charsmap[0]["precompiled_charsmap"])
    return Kind("t5", keys, build(option), dict(definition["model"]["vocab"]))


def marked_texts(definition: dict[str, Any]) -> list[str]:
    """Texts with added tokens in their midst, and with white space in front and beside them."""
    contents = [token["content"] for token in definition["added_tokens"]][:20]
    pieces = [
        f"{left}{token}{right}" for token in contents for left in ("a", "a ", "") for right in ("a", " a", "\na")
    ]
    return [*pieces, " a", "  a", "\na"]


def notes_on(tokenizer: PreTrainedTokenizerBase, kind: Kind) -> list[str]:
    """What llama.cpp does in another way at the start of a text, around it, and beside special tokens."""
    notes, backend = list(kind.notes), tokenizer.backend_tokenizer
    texts = marked_texts(json.loads(backend.to_str()))
    pairs = zip(texts, encode(backend, texts), encode(kind.tokenizer, texts), strict=True)
    if differing := [text for text, ours, theirs in pairs if ours != theirs]:
        notes.append(
            "at the start of a text or beside special tokens, llama.cpp treats white space in another way than this "
            f"tokenizer, as in {differing[0]!r}"
        )
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before, after = surrounding(tokenizer)
    if whole != [tokenizer.bos_token_id] * before + plain + [tokenizer.eos_token_id] * after:
        notes.append("this tokenizer puts other tokens around a text than bos_token and eos_token; llama.cpp does not")
    return notes


def surrounding(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether bos_token stands in front of a text, and eos_token behind it."""
    ids = tokenizer("a")["input_ids"]
    return ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]


def token_list(tokenizer: PreTrainedTokenizerBase, kind: Kind, vocab_size: int) -> tuple[list[str], list[int]]:
    """
    Each row of the embedding, as llama.cpp writes it: content and type. Rows without a token are marked unused.

    Raises:
        InputError: two rows have the same content.
    """
    from gguf import TokenType

    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    vocabulary = {index: token for token, index in backend.get_vocab(with_added_tokens=False).items()}
    tokens, types = [], []
    for index in range(vocab_size):
        token = added[index].content if index in added else vocabulary.get(index, WITHOUT_TOKEN.format(index))
        tokens.append(token)
        if index == tokenizer.unk_token_id and kind.scores is not None:
            types.append(TokenType.UNKNOWN)
        elif kind.has_bytes and token in BYTES:
            types.append(TokenType.BYTE)
        elif index in added and index in vocabulary and not token.strip(SPACE):
            types.append(TokenType.NORMAL)  # Gemma's runs of spaces: in a text they are made by merges
        elif index in added:
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if index in vocabulary else TokenType.UNUSED)
    if len(set(tokens)) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if token in tokens[:index])
        raise InputError(f"GGUF export: two rows of the vocabulary are {twice!r}.")
    return tokens, types


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: list[int]) -> list[str]:
    """
    Vocabulary, merges or scores, special tokens and chat templates.

    Args:
        ends: the tokens at which generation ends.

    Returns:
        What llama.cpp will do in another way; see `notes_on`.

    Raises:
        InputError: llama.cpp has no such tokenizer, or a file cannot name all of the ends.
    """
    kind = kind_of(tokenizer.backend_tokenizer)
    tokens, types = token_list(tokenizer, kind, vocab_size)
    writer.add_tokenizer_model(kind.model)
    for method, value in kind.keys.items():
        getattr(writer, f"add_{method}")(value)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind.scores is not None:
        lowest = min(kind.scores.values())
        writer.add_token_scores([kind.scores.get(token, lowest) for token in tokens])
    _add_special_tokens(writer, tokenizer, ends)
    _add_chat_templates(writer, tokenizer)
    return notes_on(tokenizer, kind)


def _add_special_tokens(writer, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    if ids["eos"] is None and ends:
        ids["eos"] = ends[0]
    ids["unk"] = ids["eos"] if ids["unk"] is None else ids["unk"]  # without one, readers invent a token for it
    more = [index for index in ends if index != ids["eos"]]
    if len(more) > 2:
        raise InputError(f"eos_token_id: a GGUF file names up to three tokens that end a text, got {ends}.")
    ids |= zip(("eot", "eom"), more, strict=False)  # of a turn, of a message
    for name, index in ids.items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    has_bos, has_eos = surrounding(tokenizer)
    writer.add_add_bos_token(has_bos)
    writer.add_add_eos_token(has_eos)


def _add_chat_templates(writer, tokenizer: PreTrainedTokenizerBase) -> None:
    templates = tokenizer.chat_template
    if templates is None:
        return
    names = [f"{name}_token" for name in ("bos", "eos") if getattr(tokenizer, f"{name}_token") is None]

    def complete(template: str) -> str:
        """Say which tokens there are not: llama.cpp takes number 11 for them."""
        return "".join(f"{{%- set {name} = '' -%}}" for name in names if name in template) + template

    if isinstance(templates, dict):
        templates = [{"name": name, "template": complete(template)} for name, template in templates.items()]
        writer.add_chat_template(templates)
    else:
        writer.add_chat_template(complete(templates))
