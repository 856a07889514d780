"""The probability of a sentence: what a language model is for."""

import math
from dataclasses import asdict, dataclass

from torch import nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..data.packing import IGNORED
from ..errors import InputError
from ..generation.prompts import context_limit, context_prefix
from .text import score_windows


@dataclass
class SentenceScore:
    """
    A sentence's log-probability and that of each of its tokens.

    Attributes:
        log_probability: `ln P(sentence)` in nats, the sum over its tokens (given the start of a text).
        bits_per_byte: the same as bits over the UTF-8 bytes of the sentence.
        tokens: its tokens as text.
        token_log_probabilities: nats, one for each token.
    """

    sentence: str
    log_probability: float
    bits_per_byte: float
    tokens: list[str]
    token_log_probabilities: list[float]

    def to_dict(self) -> dict:
        return asdict(self)


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """Each token as text, its leading space included; a token that is part of a character as `<0xE6><0x96>`."""
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    texts = []
    for raw, text in zip(
        tokenizer.convert_ids_to_tokens(ids), (tokenizer.decode([token]) for token in ids), strict=True
    ):
        if "\ufffd" in text:
            text = "".join(f"<0x{byte_of[letter]:02X}>" for letter in raw) if set(raw) <= set(byte_of) else raw
        texts.append(" " + text.lstrip(" ") if raw.startswith("\u2581") else text)
    return texts


def score_sentences(model: nn.Module, tokenizer, sentences: list[str], batch_size: int = 8) -> list[SentenceScore]:
    """
    Score sentences, each as the beginning of a text of its own. Scores do not depend on what shares the batch.

    Raises:
        InputError: a sentence is empty, or longer than the model can take.
    """
    prefix = context_prefix(tokenizer)
    limit = context_limit(model)
    encoded = []
    for sentence in sentences:
        ids = tokenizer(sentence, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError(f"sentence {sentence!r} has no tokens.")
        if limit is not None and len(prefix) + len(ids) > limit:
            raise InputError(f"sentence {sentence[:40]!r}... has {len(ids)} tokens; the model takes {limit}.")
        encoded.append(ids)
    unscored = 0 if prefix else 1
    windows = [
        {"input_ids": prefix + ids, "labels": [IGNORED] * (len(prefix) + unscored) + ids[unscored:]} for ids in encoded
    ]
    results = []
    for sentence, ids, scores in zip(sentences, encoded, score_windows(model, windows, batch_size), strict=True):
        total, size = math.fsum(scores), len(sentence.encode())
        tokens = token_texts(tokenizer, ids[unscored:])
        results.append(SentenceScore(sentence, total, -total / math.log(2) / size, tokens, scores.tolist()))
    return results
