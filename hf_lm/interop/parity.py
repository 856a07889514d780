"""Proof that two models are one: both read the same real text in float32, and their logits are compared."""

import math
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST_DIFFERENCE = 1e-3
LONGEST = 256  # tokens: enough to meet every kind of position, little enough for a few seconds


def default_text() -> str:
    """The opening of Melville's *Moby-Dick* (1851), in the public domain."""
    return (resources.files(__package__) / "passage.txt").read_text(encoding="utf-8")


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, limit: int
) -> tuple[torch.Tensor, int | None]:
    """
    The first tokens of a text, shape `(1, tokens)`, and how many bytes of it all but the first one stand for (None if
    that cannot be told). Without a tokenizer its bytes are taken for ids.
    """
    limit = min(limit, LONGEST)
    if tokenizer is None:
        ids = [byte % vocab_size for byte in text.encode()[:limit]]
        return torch.tensor([ids]), None
    ids = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
    decoded = tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return torch.tensor([ids]), len(decoded.encode())


@torch.no_grad()
def rounded(model: PreTrainedModel, as_written: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """A float32 model whose weights have lost what a file cannot hold: each is what comes back from it."""
    for parameter in model.parameters():
        parameter.copy_(as_written(parameter.detach()))
    return model


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | None = None,
) -> dict[str, Any]:
    """
    Args:
        model, reference: in float32, over the same vocabulary. A function from ids to logits is a model, too.
        text: default: `default_text()`.

    Returns:
        The largest absolute difference of their logits, in how many positions both find the same token most likely, the
        bits per byte of both (None where bytes cannot be counted), and the number of tokens and bytes.

    Raises:
        RuntimeError: the logits differ by more than `LARGEST_DIFFERENCE`.
    """
    config = reference.config
    ids, size = encode(
        default_text() if text is None else text, tokenizer, config.vocab_size, config.max_position_embeddings
    )
    logits = [one(input_ids=ids).logits[0].float() for one in (model, reference)]
    difference = (logits[0] - logits[1]).abs().max().item()
    bits = [
        torch.nn.functional.cross_entropy(one[:-1], ids[0, 1:], reduction="sum").item() / math.log(2) for one in logits
    ]
    if not difference <= LARGEST_DIFFERENCE:  # a NaN is no success
        raise RuntimeError(
            f"The logits of both models on the same text differ by up to {difference:.3g}; at most "
            f"{LARGEST_DIFFERENCE:g} is allowed. Nothing was written."
        )
    return {
        "max_logit_difference": difference,
        "top1_agreement": (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item(),
        "bits_per_byte": bits[0] / size if size else None,
        "reference_bits_per_byte": bits[1] / size if size else None,
        "tokens": ids.shape[1],
        "bytes": size,
    }
