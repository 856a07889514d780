"""
What happens inside a causal language model while it reads a text. Every number comes from the model's own forward:
hooks change one thing (a head, the layers above one) and the rest of the model runs as it is, whatever its family.
"""

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from ..anatomy import decoder_layers
from ..errors import InputError
from ..evaluation.sentences import token_texts
from ..generation.prompts import context_limit, context_prefix

MAX_TOKENS = 128  # more cannot be read on a page
BIT = math.log(2)  # nats


def output_projection(layer: nn.Module) -> nn.Module:
    """
    The linear map that a layer's concatenated heads go through.

    Raises:
        InputError: the attention or its projection has a name that no known family uses.
    """
    for name, attention in layer.named_children():
        if re.fullmatch(r"(self_)?att(n|ention)", name):
            for projection in ("o_proj", "c_proj", "out_proj", "dense"):
                if hasattr(attention, projection):
                    return getattr(attention, projection)
    raise InputError(f"{type(layer).__name__} has no attention with an output projection of a known name.")


def _skip(module: nn.Module, arguments: tuple, keywords: dict, output):
    """A hook that makes a layer pass on what it got."""
    hidden_states = arguments[0] if arguments else keywords["hidden_states"]
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


def lens_logits(model: nn.Module, input_ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """
    The logit lens: what the model would say after no layer, after one, ..., after all. The layers above are passed
    over; final norm, head and what else follows are the model's own.

    Yields:
        `layers + 1` times logits `(1, sequence, vocabulary)`; the last are the model's.
    """
    layers = decoder_layers(model)
    for used in range(len(layers) + 1):
        with ExitStack() as stack:
            for layer in layers[used:]:
                stack.enter_context(layer.register_forward_hook(_skip, with_kwargs=True))  # removed at exit
            yield model(input_ids=input_ids, use_cache=False).logits.float()


def head_ablation(model: nn.Module, input_ids: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
    """
    How many nats the text costs more when a head's output is set to zero; `(layers, heads)`, above 0: it helps.
    """
    heads = model.config.get_text_config().num_attention_heads
    whole = text_nats(model, input_ids)
    costs = []
    for layer in decoder_layers(model):
        for start in range(0, heads, batch_size):
            silenced = torch.arange(start, min(start + batch_size, heads))

            def silence(module: nn.Module, arguments: tuple, silenced=silenced):
                by_head = arguments[0].unflatten(-1, (heads, -1)).clone()
                by_head[torch.arange(len(silenced)), :, silenced] = 0
                return (by_head.flatten(-2), *arguments[1:])

            with output_projection(layer).register_forward_pre_hook(silence):
                costs.append(text_nats(model, input_ids.expand(len(silenced), -1)) - whole)
    return torch.cat(costs).view(-1, heads)


def text_nats(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each row after its first token, `(batch,)`."""
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none").sum(dim=1)


def integrated_gradients(
    model: nn.Module, input_ids: torch.Tensor, target: int, neutral: int, kept: int = 1, tolerance: float = 0.01
) -> dict:
    """
    How much each token adds to the log-probability of the token at `target` (arXiv:1703.01365), compared to a text
    that has the token `neutral` everywhere. (A baseline of real embeddings: between mean or zero embeddings and the
    text, deep models jump by many nats.)

    Each piece of the path is integrated by Gauss-Legendre with 8 points and halved until what its attributions lack of
    the change between its ends (completeness) is less than its share of `tolerance` times the whole change.

    Args:
        kept: number of first tokens, the start of a text, that stay unchanged.

    Returns:
        `values` `(sequence,)` in nats, `start` and `end`: the log-probability without and with the tokens; `points`
        at which gradients were taken; `gap`: what the values' sum lacks.
    """
    embedding = model.get_input_embeddings()
    inputs = embedding(input_ids).detach()
    baseline = embedding(torch.full_like(input_ids, neutral)).detach()
    baseline[:, :kept] = inputs[:, :kept]
    places, weights = np.polynomial.legendre.leggauss(8)
    places, weights = (np.array([-1, *places, 1]) + 1) / 2, torch.tensor([0, *weights / 2, 0]).to(inputs)
    total, start, end, points, allowed = torch.zeros_like(inputs), None, None, 0, math.inf
    pieces = [(0.0, 1.0)]
    while pieces:
        low, high = pieces.pop()
        at = torch.tensor(low + (high - low) * places).to(inputs)[:, None, None]
        path = (baseline + at * (inputs - baseline)).requires_grad_()
        logits = model(inputs_embeds=path, use_cache=False).logits[:, target - 1].float()
        values = logits.log_softmax(dim=-1)[:, input_ids[0, target]]
        slopes = torch.autograd.grad(values.sum(), path)[0]
        part = (high - low) * torch.einsum("p,psh->sh", weights, slopes) * (inputs - baseline)
        points += len(places)
        if start is None:
            start, end = values[0].item(), values[-1].item()
            allowed = tolerance * max(1.0, abs(end - start))
        gap = (values[-1] - values[0] - part.sum()).item()
        if abs(gap) <= allowed * (high - low) or high - low < 1 / 500:
            total += part
        else:
            pieces += [(low, (low + high) / 2), ((low + high) / 2, high)]
    values = total.sum(dim=-1)[0].tolist()
    return {"values": values, "start": start, "end": end, "points": points, "gap": end - start - math.fsum(values)}


def attention_weights(model: nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(layers, heads, sequence, sequence)` from the model's eager attention, and the logits beside them."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        outputs = model(input_ids=input_ids, use_cache=False, output_attentions=True)
    finally:
        model.set_attn_implementation(implementation)
    return torch.cat(outputs.attentions).float(), outputs.logits.float()


def inspect_text(model: nn.Module, tokenizer, text: str, target: int | None = None) -> dict:
    """
    Everything the page of `hf-lm inspect` shows.

    Args:
        target: the token (0: the text's first) whose probability is traced back to those before it; default: the last.

    Returns:
        `tokens`, `bits` (surprise of each), `guesses`, `attention` (a tensor), `lens`, `attribution`, `ablation`
        (bits), `checks`.

    Raises:
        InputError: the text is empty or too long, or `target` is not in it.
    """
    prefix = context_prefix(tokenizer)
    ids = prefix + tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = min(context_limit(model) or MAX_TOKENS, MAX_TOKENS)
    if not 2 <= len(ids) <= limit:
        raise InputError(
            f"--text: must have between 1 and {limit - len(prefix)} tokens, got {len(ids) - len(prefix)}."
        )
    given = max(len(prefix), 1)
    place = len(ids) - 1 if target is None else len(prefix) + target
    if not given <= place < len(ids):
        raise InputError(f"--target: must be between 0 and {len(ids) - 1 - len(prefix)}, got {target}.")
    input_ids = torch.tensor([ids], device=model.device)

    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits.float()
        attention, eager_logits = attention_weights(model, input_ids)
        lens = []
        for seen in lens_logits(model, input_ids):
            shares, best = seen[0].softmax(dim=-1).max(dim=-1)
            lens.append(list(zip(token_texts(tokenizer, best.tolist()), shares.tolist(), strict=True)))
        ablation = head_ablation(model, input_ids) / BIT
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"] or ids
    attribution = integrated_gradients(model, input_ids, place, line_break[-1], kept=given)
    shares, best = logits[0].softmax(dim=-1).topk(5, dim=-1)
    bits = -logits[0, :-1].log_softmax(dim=-1).gather(1, input_ids[0, 1:, None])[:, 0] / BIT
    return {
        "text": text,
        "tokens": token_texts(tokenizer, ids),
        "bits": [None] * given + bits[given - 1 :].tolist(),
        "guesses": [
            list(zip(token_texts(tokenizer, row.tolist()), row_shares.tolist(), strict=True))
            for row, row_shares in zip(best, shares, strict=True)
        ],
        "attention": attention,
        "lens": lens,
        "attribution": {"target": place, **attribution},
        "ablation": ablation.tolist(),
        "checks": {
            "attention rows sum to 1, off by at most": (attention.sum(dim=-1) - 1).abs().max().item(),
            "last row of the lens and the logits differ by at most": (seen - logits).abs().max().item(),
            "eager and default attention: logits differ by at most": (eager_logits - logits).abs().max().item(),
            "attributions and the change they explain differ by (nats)": abs(attribution["gap"]),
        },
    }
