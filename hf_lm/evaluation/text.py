"""Held-out text: loss, perplexity and bits per byte, each token scored exactly once."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..data.collator import PackedCollator
from ..data.packing import IGNORED, encode_documents, evaluation_windows, segment_prefix
from ..errors import InputError


@torch.no_grad()
def token_log_probabilities(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """
    The log-probability (nats) the model gives to each token, 0 where the label is -100 or nothing comes before.

    Args:
        input_ids, labels: `(batch, sequence)`, not shifted.

    Returns:
        `(batch, sequence)`, float32; the first column is 0.
    """
    logits = model(input_ids=input_ids, use_cache=False, **inputs).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    return nn.functional.pad(-losses, (1, 0))


def context_prefix(tokenizer) -> list[int]:
    """
    What stands before a text when it is scored: the tokenizer's own prefix, or, if it has none, bos or eos, so that
    the first token is scored too (as lm-eval does).
    """
    if prefix := segment_prefix(tokenizer):
        return prefix
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if first is None else [first]


@dataclass
class TextScore:
    """
    How well a model predicts some documents.

    Attributes:
        nats: summed negative log-likelihood of each window.
        tokens: scored tokens of each window.
        num_bytes: UTF-8 bytes that these tokens cover, of each window.
        documents: the document each window belongs to.
    """

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return math.fsum(self.nats) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits of all scored tokens over the UTF-8 bytes they cover."""
        return math.fsum(self.nats) / math.log(2) / sum(self.num_bytes)

    def interval(self, confidence: float = 0.95, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """
        Bootstrap interval of the bits per byte, from resampled documents (windows, if there are few documents).

        Args:
            confidence: share of the resampled values that lies inside.
        """
        keys = self.documents if len(set(self.documents)) >= 10 else range(len(self.nats))
        groups: dict[int, list[float]] = {}
        for key, nats, size in zip(keys, self.nats, self.num_bytes, strict=True):
            total = groups.setdefault(key, [0.0, 0.0])
            total[0] += nats
            total[1] += size
        table = np.array(list(groups.values()))
        picks = np.random.default_rng(seed).integers(0, len(table), (samples, len(table)))
        sums = table[picks].sum(axis=1)
        values = sums[:, 0] / math.log(2) / sums[:, 1]
        tail = (1 - confidence) / 2
        return float(np.quantile(values, tail)), float(np.quantile(values, 1 - tail))

    def summary(self) -> dict:
        """The numbers as one flat dict."""
        low, high = self.interval()
        return {
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_low": low,
            "bits_per_byte_high": high,
            "perplexity": self.perplexity,
            "loss": self.loss,
            "tokens": sum(self.tokens),
            "bytes": sum(self.num_bytes),
            "documents": len(set(self.documents)),
        }


def score_documents(
    model: nn.Module,
    tokenizer,
    texts: Iterable[str],
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> TextScore:
    """
    Score texts with any causal language model of the library.

    Every token of every document, eos included, is scored once, so the result is the same at any batch size. Without
    a `stride` the windows do not overlap: the number is the one a training run reports. A smaller stride gives each
    token more context and so a lower loss.

    Args:
        block_size: tokens of a window; default: as many as the model was made for (at most 2,048).
        stride: new tokens of each window; default: all.

    Raises:
        InputError: there is nothing to score, or `stride` does not fit.
    """
    if block_size is None:
        block_size = min(getattr(model.config, "max_position_embeddings", 1024), 2048)
    collate = PackedCollator(tokenizer.pad_token_id)
    result = TextScore()

    def flush(batch: list[dict]) -> None:
        inputs = {name: value.to(model.device) for name, value in collate(batch).items()}
        scores = token_log_probabilities(model, **inputs).double().sum(dim=1).tolist()
        for row, nats in zip(batch, scores, strict=True):
            result.nats.append(-nats)
            result.tokens.append(row["tokens"])
            result.num_bytes.append(row["num_bytes"])
            result.documents.append(row["document"])

    batch: list[dict] = []
    prefix = context_prefix(tokenizer)
    for number, (ids, sizes) in enumerate(encode_documents(texts, tokenizer)):
        place = 0
        for window in evaluation_windows(ids, block_size, stride, prefix):
            tokens = int((window["labels"] != IGNORED).sum())
            end = place + tokens + (0 if prefix or place else 1)  # without a prefix the first token is not scored
            covered = int(sizes[end - tokens : end].sum())
            place = end
            positions = np.arange(len(window["input_ids"]))
            batch.append(
                {**window, "position_ids": positions, "document": number, "tokens": tokens, "num_bytes": covered}
            )
            if len(batch) == batch_size:
                flush(batch)
                batch = []
    if batch:
        flush(batch)
    if not sum(result.tokens):
        raise InputError("there is no text to score.")
    return result
