"""The probability of a sentence: what a language model is for."""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ..data.packing import IGNORED
from ..errors import InputError
from .text import context_prefix, token_log_probabilities


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


def score_sentences(model: nn.Module, tokenizer, sentences: list[str], batch_size: int = 8) -> list[SentenceScore]:
    """
    Score sentences, each as the beginning of a text of its own. Scores do not depend on what shares the batch.

    Raises:
        InputError: a sentence is empty, or longer than the model can take.
    """
    prefix = context_prefix(tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    encoded = []
    for sentence in sentences:
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"sentence {sentence!r} has no tokens.")
        if limit is not None and len(prefix) + len(ids) > limit:
            raise InputError(f"sentence {sentence[:40]!r}... has {len(ids)} tokens; the model takes {limit}.")
        encoded.append(ids)
    results = []
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        longest = len(prefix) + max(map(len, batch))
        shape = (len(batch), longest)
        input_ids = torch.full(shape, tokenizer.pad_token_id or 0, dtype=torch.long, device=model.device)
        labels, mask = torch.full_like(input_ids, IGNORED), torch.zeros_like(input_ids)
        for row, ids in enumerate(batch):
            end = len(prefix) + len(ids)
            input_ids[row, :end] = torch.tensor(prefix + ids)
            labels[row, len(prefix) : end] = torch.tensor(ids)
            mask[row, :end] = 1
        scores = token_log_probabilities(model, input_ids, labels, attention_mask=mask)
        for sentence, ids, row in zip(sentences[start:], batch, scores.double(), strict=False):
            values = row[len(prefix) : len(prefix) + len(ids)].tolist()
            total = math.fsum(values)
            tokens = [tokenizer.decode([token]) for token in ids]
            size = len(sentence.encode())
            results.append(SentenceScore(sentence, total, -total / math.log(2) / size, tokens, values))
    return results
