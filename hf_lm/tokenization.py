"""Train a tokenizer on text: byte-level BPE, single characters, or bytes. Decoding gives back every string."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import InputError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = [BOS, EOS, PAD]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
KINDS = ("bpe", "char", "byte")
PIECE = 1 << 14  # characters after which a long text is cut
LONGEST_PIECE = (
    1 << 20
)  # characters after which a text is cut wherever that is: a token needs a hundred bytes of memory
UNSPACED = 1 << 24  # characters that merges are learned from of text without white space, of which each takes 60 bytes
# Bytes after which a word is cut while merges are learned: their time grows with the square of its length. Few texts
# with white space have such words, and without it (DNA, base64) merges across the cuts are hardly missed.
LONGEST_WORD = 512
BOUNDED = pre_tokenizers.Split(Regex(f".{{{LONGEST_WORD}}}"), "isolated")
# In front of white space that comes after something printed. The lookbehind is stricter than "not white space", about
# which Python and the tokenizers disagree for some control characters.
CUT = re.compile(r"(?<=[!-~\w])(?=[ \n])")


def cut(text: str) -> Iterator[str]:
    """
    A text in pieces, so that its length bounds neither memory nor time; see `may_be_cut`. Where there is nothing but
    letters for `LONGEST_PIECE` characters, the cut may fall into a token.
    """
    start = 0
    while len(text) - start > PIECE:
        found = CUT.search(text, start + PIECE, start + LONGEST_PIECE)
        if found is None and len(text) - start <= LONGEST_PIECE:
            break
        end = found.start() if found else start + LONGEST_PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _to_learn_from(texts: Iterable[str]) -> Iterator[str]:
    """The pieces of some texts, and no more than `UNSPACED` characters of what has no white space to be cut at."""
    room = UNSPACED
    for piece in (piece for text in texts for piece in cut(text)):
        if len(piece) > 2 * PIECE:
            room -= len(piece)
        if len(piece) <= 2 * PIECE or room >= 0:
            yield piece


def may_be_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """
    Whether the pieces of `cut` have exactly the tokens of the whole text (but where it has no white space for long).

    That is so where words are found by GPT-2's pattern (a word has white space at its start or is nothing else, and
    nothing looks back), where digits are at most set apart, where the text is not changed before, and where no added
    token holds or swallows white space.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = backend["pre_tokenizer"] or {"type": None}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    words = [step for step in steps if step["type"] == "ByteLevel"]
    return (
        backend["normalizer"] is None
        and backend["model"]["type"] == "BPE"
        and not backend["model"].get("dropout")
        and all(step["type"] in ("ByteLevel", "Digits") for step in steps)
        and [(step["use_regex"], step["add_prefix_space"]) for step in words] == [(True, False)]
        and not any(token["rstrip"] or re.search(r"\s", token["content"]) for token in backend["added_tokens"])
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048, kind: str = "bpe") -> PreTrainedTokenizerFast:
    """
    A tokenizer for these texts.

    All kinds know all 256 bytes, so that any text (Chinese, emoji, control characters) survives the round trip. A text
    is encoded with `<|bos|>` in front, as the segments of a training block are.

    Args:
        texts: what the vocabulary is learned from.
        vocab_size: largest number of tokens, the three special ones included.
        kind: `"bpe"`: byte-level byte-pair encoding with GPT-2's word pattern. (GPT-4's pattern needs 3% fewer tokens
            on Moby-Dick, but the model then ended 0.02 bits per byte worse.) `"char"`: the texts' characters; others
            fall back to their bytes. `"byte"`: the 256 bytes.

    Raises:
        InputError: `vocab_size` is smaller than the alphabet, or `kind` is unknown.
    """
    if kind not in KINDS:
        raise InputError(f"tokenizer_kind: must be one of {', '.join(KINDS)}, got {kind!r}.")
    smallest = len(ALPHABET) + len(SPECIAL_TOKENS)
    if kind == "byte":
        vocab_size = smallest
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size: {vocab_size} is smaller than the alphabet; it must be at least {smallest} "
            f"({len(ALPHABET)} bytes and {len(SPECIAL_TOKENS)} special tokens)."
        )
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, BOUNDED])
    if kind == "char":  # merges are learned inside the bytes of one character only
        one_character = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([one_character, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_to_learn_from(texts) if kind != "byte" else [], trainer)
    # For encoding, words need no bound: that takes little more than linear time. They are quicker than characters, too,
    # and give the same: a merge's right side never starts a character in UTF-8.
    tokenizer.pre_tokenizer = words
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], new_tokens: int
) -> tuple[PreTrainedTokenizerBase, list[list[int]]]:
    """
    A byte-level BPE tokenizer with the merges of another language behind its own.

    Old tokens keep their ids, and a text in which no new merge occurs keeps its tokens. The new merges are learned on
    what the old tokenizer makes of the texts: to the trainer, each of its tokens is one letter.

    Args:
        texts: what the merges are learned from.
        new_tokens: how many are added, at most.

    Returns:
        The new tokenizer and, for each new token in order, the old tokens that it stands for.

    Raises:
        InputError: the tokenizer is no byte-level BPE, or `new_tokens` is not positive.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"].get("vocab")
    if backend["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(backend["decoder"]):
        raise InputError("extend_vocab_size: only a byte-level BPE tokenizer can be extended.")
    if new_tokens < 1:
        raise InputError(f"extend_vocab_size: must be at least 1, got {new_tokens}.")

    first_letter = 0x10000  # beyond white space and surrogates

    def spelled() -> Iterator[str]:
        for piece in _to_learn_from(texts):
            encoding = tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False)
            pairs = zip(encoding.word_ids, encoding.ids, strict=True)
            words = (
                "".join(chr(first_letter + i) for _, i in word) for _, word in groupby(pairs, key=lambda pair: pair[0])
            )
            yield " ".join(words)

    lines = list(spelled())
    letters = set().union(*lines) - {" "}
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BOUNDED])
    trainer = trainers.BpeTrainer(vocab_size=len(letters) + new_tokens, show_progress=False)
    learner.train_from_iterator(lines, trainer)

    content = {index: token for token, index in vocabulary.items()}
    next_id, parts = len(tokenizer), []
    for merge in json.loads(learner.to_str())["model"]["merges"]:
        left, right = ([ord(letter) - first_letter for letter in side] for side in merge)
        names = ["".join(content[index] for index in side) for side in (left, right)]
        backend["model"]["merges"].append(names)
        if "".join(names) not in vocabulary:
            vocabulary["".join(names)] = next_id + len(parts)
            parts.append(left + right)
    kept = ("chat_template", "model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
    extended = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        name_or_path=tokenizer.name_or_path,
        **{name: getattr(tokenizer, name) for name in kept},
        **tokenizer.special_tokens_map,
    )
    return extended, parts
