"""Held-out text: loss, perplexity and bits per byte, each token scored exactly once."""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice, tee
from operator import itemgetter

import numpy as np
import torch
from tokenizers import processors
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..data.packing import IGNORED, encode_documents, evaluation_windows, segment_prefix, segments
from ..errors import InputError
from ..generation.prompts import context_limit, context_prefix
from ..loading import load_model, load_tokenizer

PIECE = 128  # bytes of the smallest piece of text that is looked at on its own
# With few documents, this number of runs of text is resampled. Runs are long, because hard passages are: on a tenth
# of Moby-Dick (120 KB) runs of 128 bytes give an interval of 0.033 bits per byte, of 1 KB 0.053, of 4 KB 0.073.
RUNS = 30
LOGITS = 1 << 28  # logits of one forward at most (1 GiB in float32): large vocabularies get smaller batches


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


def without_ending(tokenizer):
    """The tokenizer; where it ends texts (by eos), a copy that does not, for programs that continue what it encodes."""
    prefix = segment_prefix(tokenizer)
    if tokenizer("a")["input_ids"] == [*prefix, *tokenizer("a", add_special_tokens=False)["input_ids"]]:
        return tokenizer
    tokenizer, tokens = copy.deepcopy(tokenizer), tokenizer.convert_ids_to_tokens(prefix)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*tokens, "$A"], special_tokens=list(zip(tokens, prefix, strict=True))
    )
    return tokenizer


def score_windows(
    model: nn.Module, windows: Iterable[dict], batch_size: int = 8, measure: Callable = token_log_probabilities
) -> Iterator[np.ndarray]:
    """
    The log-probabilities (or what else `measure` finds) of the labelled tokens of each window, in order.

    Windows of like length share a batch, padded on the right and masked, which any model of transformers understands;
    what else is in a batch does not change a window's result.

    Args:
        windows: `input_ids` and `labels`, `(window,)` each, -100 where nothing is scored.

    Yields:
        For each window, float64 values of shape `(scored tokens,)`.
    """
    windows, fill = iter(windows), {"input_ids": 0, "labels": IGNORED}
    while group := list(islice(windows, 32 * batch_size)):
        order = sorted(range(len(group)), key=lambda number: -len(group[number]["input_ids"]))
        results: list = [None] * len(group)
        while order:
            longest = len(group[order[0]]["input_ids"])
            count = max(1, min(batch_size, LOGITS // (longest * model.config.get_text_config().vocab_size)))
            batch, order = order[:count], order[count:]
            rows = [{name: torch.as_tensor(group[number][name]).long() for name in fill} for number in batch]
            inputs = {
                name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
                for name, value in fill.items()
            }
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            if lengths.min() < longest:
                inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
            labels = inputs["labels"]
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            scores = measure(model, **inputs).double().cpu()
            for row, number in enumerate(batch):
                results[number] = scores[row][labels[row] != IGNORED].numpy()
        yield from results


@dataclass
class TextScore:
    """
    How well a model predicts some documents, in parts: pieces of text, or the blocks of a training run.

    Attributes:
        nats: summed negative log-likelihood of each part.
        tokens: scored tokens of each part.
        num_bytes: UTF-8 bytes that these tokens cover, of each part.
        documents: the document each part belongs to.
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

    def by_document(self) -> list[dict]:
        """`document` (its number), `bits_per_byte`, `tokens` and `bytes` of each document, the worst first."""
        documents, numbers = np.unique(self.documents, return_inverse=True)
        columns = (np.bincount(numbers, weights=values) for values in (self.nats, self.tokens, self.num_bytes))
        rows = [
            {
                "document": int(document),
                "bits_per_byte": float(nats / math.log(2) / size),
                "tokens": int(tokens),
                "bytes": int(size),
            }
            for document, nats, tokens, size in zip(documents, *columns, strict=True)
            if size
        ]
        return sorted(rows, key=itemgetter("bits_per_byte"), reverse=True)

    def interval(
        self, confidence: float = 0.95, minus: "TextScore | None" = None, samples: int = 1000, seed: int = 0
    ) -> tuple[float, float]:
        """
        Percentile bootstrap interval of the bits per byte, or of their difference to another model's on the same text
        (paired: both are resampled alike). Documents are resampled if there are at least ten, else runs of text.

        Raises:
            InputError: the other score is of another text.
        """
        if minus is not None and (self.num_bytes, self.documents) != (minus.num_bytes, minus.documents):
            raise InputError("the two scores are of different texts, or their tokens cover different bytes.")
        places = np.arange(len(self.nats))
        runs = places * min(RUNS, len(places)) // len(places)
        keys = self.documents if len(set(self.documents)) >= 10 else runs
        groups, numbers = np.unique(np.asarray(keys), return_inverse=True)
        nats = np.asarray(self.nats) - (0.0 if minus is None else np.asarray(minus.nats))
        table = np.stack([np.bincount(numbers, weights=values) for values in (nats, self.num_bytes)], axis=1)
        random = np.random.default_rng(seed)
        sums = np.array([table[random.integers(0, len(groups), len(groups))].sum(axis=0) for _ in range(samples)])
        tails = (1 - confidence) / 2, (1 + confidence) / 2
        low, high = np.quantile(sums[:, 0] / math.log(2) / sums[:, 1], tails).tolist()
        return low, high

    def compared_to(self, other: "TextScore", confidence: float = 0.95) -> dict:
        """Own bits per byte minus the other model's on the same text: `difference`, `low`, `high` (see `interval`)."""
        low, high = self.interval(confidence, minus=other)
        return {"difference": self.bits_per_byte - other.bits_per_byte, "low": low, "high": high}

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


def _strided(texts, tokenizer, block_size: int, stride: int, prefix: list[int]) -> Iterator[dict]:
    for document, (ids, sizes) in enumerate(encode_documents(texts, tokenizer)):
        place = 0
        for window in evaluation_windows(ids, block_size, stride, prefix):
            scored = int((window["labels"] != IGNORED).sum())
            end = place + scored + (0 if prefix or place else 1)  # without a prefix the first token is not scored
            yield {**window, "sizes": sizes[end - scored : end], "document": document}
            place = end


def _pieces(nats: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Tokens to pieces of `PIECE` bytes, the same for any tokenizer: a token astride a boundary is shared out.

    Args:
        nats, sizes: of each token, `(tokens,)`.

    Returns:
        Nats, tokens and bytes of each piece, `(pieces,)`.
    """
    ends = np.cumsum(sizes)
    edges = np.arange(PIECE, ends[-1], PIECE)
    shares = np.interp(edges, np.append(0, ends), np.append(0.0, np.cumsum(nats)))
    counts = np.searchsorted(ends, edges, side="right")
    return (
        np.diff(shares, prepend=0.0, append=nats.sum()),
        np.diff(counts, prepend=0, append=len(sizes)),
        np.diff(edges, prepend=0, append=ends[-1]),
    )


def score_documents(
    model: nn.Module,
    tokenizer,
    texts: Iterable[str],
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> TextScore:
    """
    Score texts with any causal language model of transformers.

    Every token of every document, eos included, is scored once, so the result is the same at any batch size. Without
    a `stride` documents are cut as `pack_documents` cuts them: with the run's block size the number is the one a
    training run reports. (A tokenizer without a prefix, such as GPT-2's, gets eos in front of each segment as lm-eval
    does; training leaves the first token unscored.) A stride gives each token more context and so a lower loss.

    Args:
        block_size: tokens of a window; default: as many as the model was made for (at most 2,048).
        stride: new tokens of each window; default: all.

    Raises:
        InputError: there is nothing to score, or `block_size` or `stride` does not fit.
    """
    limit = context_limit(model)
    block_size = block_size or min(limit or 1024, 2048)
    prefix = context_prefix(tokenizer)
    if block_size <= max(len(prefix), 1) or block_size > (limit or block_size):
        raise InputError(f"block_size: must be more than {max(len(prefix), 1)} and at most {limit}, got {block_size}.")
    if stride is None:
        windows = segments(texts, tokenizer, block_size, prefix)
    else:
        windows = _strided(texts, tokenizer, block_size, stride, prefix)
    windows, inputs = tee(windows)
    rows, result = zip(windows, score_windows(model, inputs, batch_size), strict=True), TextScore()
    for document, group in groupby(rows, key=lambda row: row[0]["document"]):
        parts = [(window["sizes"], log_probabilities) for window, log_probabilities in group]
        sizes, log_probabilities = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if len(sizes):
            nats, tokens, num_bytes = _pieces(-log_probabilities, sizes)
            result.nats += nats.tolist()
            result.tokens += tokens.tolist()
            result.num_bytes += num_bytes.tolist()
            result.documents += [document] * len(nats)
    if not sum(result.tokens):
        raise InputError("there is no text to score.")
    return result


def score_with(model, tokenizer, texts: Iterable[str], **options) -> TextScore:
    """`score_documents` for a model that is given as folder or Hub id, or as model and tokenizer."""
    if isinstance(model, str | os.PathLike):
        tokenizer = tokenizer or load_tokenizer(str(model))
        model = load_model(str(model))
    if tokenizer is None:
        raise InputError("tokenizer: a model that is already loaded needs one.")
    return score_documents(model, tokenizer, texts, **options)
