"""Proof that two models are one: both read the same real text in float32, and their logits are compared."""

import math
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import Failure
from .heads import HEADS

LARGEST_DIFFERENCE = 1e-3
LONGEST = 256  # tokens: enough to meet every kind of position, little enough for a few seconds
PIECE = 16  # tokens of a text that gets one label


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
def rounded(model: PreTrainedModel, as_written: Callable[[str, torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """
    A float32 model whose weights have lost what a file cannot hold.

    Args:
        as_written: name and value of a weight -> what comes back from the file.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(as_written(name, parameter.detach()))
    return model


def head_outputs(model: PreTrainedModel | Callable, ids: torch.Tensor) -> torch.Tensor:
    """
    What a model says of tokens `(1, tokens)`, in float32: logits `(tokens, vocabulary or labels)`; where an answer starts
    and ends, `(2, tokens)`; of each piece of the text, `(pieces, labels)`, where the head labels whole texts.
    """
    output = model(input_ids=ids)
    if hasattr(output, "start_logits"):
        return torch.stack([output.start_logits[0], output.end_logits[0]]).float()
    if output.logits.ndim == 3:
        return output.logits[0].float()
    return torch.cat([model(input_ids=piece).logits for piece in ids.split(PIECE, dim=1)]).float()


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | None = None,
) -> dict[str, Any]:
    """
    Args:
        model, reference: in float32, over the same vocabulary, with the same head. A function from ids to outputs is a
            model, too.
        text: default: `default_text()`.

    Returns:
        The largest absolute difference of their logits, how often both find the same token (or label, or place) most
        likely, the bits per byte of both (None where bytes cannot be counted, and of models that give labels), and the
        number of tokens and bytes.

    Raises:
        RuntimeError: the logits differ by more than `LARGEST_DIFFERENCE`.
    """
    config = reference.config
    ids, size = encode(
        default_text() if text is None else text, tokenizer, config.vocab_size, config.max_position_embeddings
    )
    logits = [head_outputs(one, ids) for one in (model, reference)]
    difference = (logits[0] - logits[1]).abs().max().item()
    if not difference <= LARGEST_DIFFERENCE:  # a NaN is no success
        raise Failure(
            f"The logits of both models on the same text differ by up to {difference:.3g}; at most "
            f"{LARGEST_DIFFERENCE:g} is allowed. Nothing was written."
        )
    bits = [None, None]
    if size and not type(reference).__name__.endswith(tuple(HEADS)):
        nats = (torch.nn.functional.cross_entropy(one[:-1], ids[0, 1:], reduction="sum").item() for one in logits)
        bits = [value / math.log(2) / size for value in nats]
    return {
        "max_logit_difference": difference,
        "top1_agreement": (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item(),
        "bits_per_byte": bits[0],
        "reference_bits_per_byte": bits[1],
        "tokens": ids.shape[1],
        "bytes": size,
    }
