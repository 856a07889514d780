"""Beyond the loss: calibration, repetition and diversity of samples, and how much of them is copied."""

import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from ..data.packing import IGNORED


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """
    Mean distance between confidence and accuracy over bins of equal width, weighted by their size (arXiv:1706.04599).

    Args:
        confidence: probability of the chosen class, `(examples,)`.
        correct: whether it was right, `(examples,)`.
    """
    bin_of = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, weights=np.asarray(confidence) - np.asarray(correct, dtype=float), minlength=bins)
    return float(np.abs(gap).sum() / len(bin_of))


@torch.no_grad()
def _signed_confidence(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """The probability of the most likely token at each place, negative where another one came; `(batch, sequence)`."""
    logits = model(input_ids=input_ids, use_cache=False, **inputs).logits[:, :-1].float()
    confidence, guess = logits.softmax(dim=-1).max(dim=-1)
    return nn.functional.pad(torch.where(guess == labels[:, 1:], confidence, -confidence), (1, 0))


def token_calibration(model: nn.Module, batches: Iterable[dict]) -> dict:
    """
    How right a language model is when it is sure of the next token.

    Args:
        batches: the model's inputs, with `labels`, which are -100 where nothing is counted.

    Returns:
        `ece` (see above), `accuracy` of the most likely token, its mean `confidence`, `tokens`.
    """
    counted = []
    for batch in batches:
        batch = send_to_device(batch, model.device)
        signed = _signed_confidence(model, **batch)[:, 1:]
        counted.append(signed[batch["labels"][:, 1:] != IGNORED].double().cpu().numpy())
    signed = np.concatenate(counted)
    confidence, correct = np.abs(signed), signed > 0
    return {
        "ece": expected_calibration_error(confidence, correct),
        "accuracy": float(correct.mean()),
        "confidence": float(confidence.mean()),
        "tokens": len(signed),
    }


def _ngrams(items: Sequence[Hashable], size: int) -> list[tuple]:
    return list(zip(*(items[start:] for start in range(size)), strict=False))


def distinct_n(samples: Iterable[Sequence[Hashable]], size: int) -> float:
    """Different n-grams over all n-grams of all samples, words or token ids (arXiv:1510.03055); nan without any."""
    ngrams = [ngram for sample in samples for ngram in _ngrams(sample, size)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repetition(samples: Iterable[Sequence[Hashable]], size: int = 4) -> float:
    """The share of a sample's n-grams that it has had before, mean over samples (seq-rep-n, arXiv:1908.04319)."""
    shares = [1 - distinct_n([sample], size) for sample in samples if len(sample) >= size]
    return sum(shares) / len(shares) if shares else math.nan


def longest_overlap(samples: Sequence[str], text: str) -> str:
    """
    The longest stretch that one of the samples shares verbatim with a text: a check for memorised passages.

    Bisection over its length; windows of a length are compared by polynomial hashes modulo 2^64, all of them at once,
    and the match is confirmed. 10 MB of text take a few seconds.
    """
    codes = [np.frombuffer(part.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) for part in (text, *samples)]
    base, modulus = 0x9E3779B97F4A7C15, 1 << 64
    longest = max(map(len, codes))
    with np.errstate(over="ignore"):
        powers, inverses = (
            np.cumprod(np.array([1] + [factor] * longest, dtype=np.uint64))
            for factor in (base, pow(base, -1, modulus))
        )
        sums = [np.append(np.uint64(0), np.cumsum((code + np.uint64(1)) * powers[: len(code)])) for code in codes]

    def hashes(number: int, length: int) -> np.ndarray:
        starts = len(codes[number]) - length + 1
        with np.errstate(over="ignore"):
            return (sums[number][length:] - sums[number][:starts]) * inverses[:starts]

    def shared(length: int) -> str | None:
        of_text = hashes(0, length)
        for number, sample in enumerate(samples, 1):
            if len(sample) < length:
                continue
            of_sample = hashes(number, length)
            table = np.zeros(1 << 16, dtype=bool)  # a quick look at 16 bits first
            table[of_sample >> np.uint64(48)] = True
            likely = of_text[table[of_text >> np.uint64(48)]]
            for start in np.flatnonzero(np.isin(of_sample, likely)):
                if (stretch := sample[start : start + length]) in text:
                    return stretch
        return None

    low, best = 0, ""
    high = min(len(text), max(map(len, samples), default=0))
    while low < high:
        middle = (low + high + 1) // 2
        found = shared(middle)
        low, high, best = (middle, high, found) if found else (low, middle - 1, best)
    return best


def sample_quality(samples: Sequence[str], training_text: str) -> dict:
    """
    What a report says of generated samples: how many, `repetition`, `distinct_1` and `distinct_2` over words, and the
    longest stretch copied from the training text: `overlap`, its text, and `overlap_characters`.
    """
    words = [sample.split() for sample in samples]
    overlap = longest_overlap(samples, training_text)
    return {
        "samples": len(samples),
        "repetition": repetition(words),
        "distinct_1": distinct_n(words, 1),
        "distinct_2": distinct_n(words, 2),
        "overlap": overlap,
        "overlap_characters": len(overlap),
    }
