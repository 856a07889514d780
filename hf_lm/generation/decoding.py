"""Decoding: the settings of sampling, random numbers that disturb nobody, and batches of prompts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .prompts import encode_prompt

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def decoding_settings(temperature: float, top_p: float = 1.0) -> dict:
    """Return `generate()`'s settings: greedy decoding at temperature 0, else sampling from the top `top_p`."""
    if temperature == 0:
        return dict(GREEDY)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """
    Seed the random generators of the CPU and of all devices of this kind; restore them at the end.

    Sampling within a training run must not change the run's own random numbers (dropout's, for one).
    """
    has_numbers = device.type not in ("cpu", "mps")
    numbers = range(torch.get_device_module(device).device_count()) if has_numbers else []
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=numbers, device_type=device.type if has_numbers else "cuda"):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; restore its mode at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def stop_tokens(config: GenerationConfig) -> set[int]:
    """Return the tokens that end an answer."""
    stops = config.eos_token_id
    return {stops} if isinstance(stops, int) else set(stops or ())


def pad_token(model: nn.Module) -> int:
    """Return the token for places that are masked: the model's own, or 0."""
    pad = model.generation_config.pad_token_id
    return pad if isinstance(pad, int) and pad >= 0 else 0


def generate_batch(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, **settings) -> list[list[int]]:
    """
    Continue prompts together, padded on the left.

    Args:
        prompts: tokens of each, none empty.
        settings: of `generate()`, such as `GREEDY` or those of a beam search.

    Returns:
        The new tokens of each prompt, up to the first that ends it.
    """
    width, pad = max(map(len, prompts)), pad_token(model)
    rows = [[pad] * (width - len(ids)) + ids for ids in prompts]
    masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    output = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(masks, device=model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        use_cache=True,  # training turns it off
        **settings,
    )
    answers, stops = output[:, width:].tolist(), stop_tokens(model.generation_config)
    ends = [next((place for place, token in enumerate(ids, 1) if token in stops), None) for ids in answers]
    return [ids[:end] for ids, end in zip(answers, ends, strict=True)]


def continue_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    count: int = 1,
    seed: int = 0,
) -> list[dict]:
    """
    Sample continuations at temperature 0.8: always the same of the same weights, and without an effect on the random
    numbers of whoever asks.

    Args:
        count: samples of each prompt.

    Returns:
        `prompt` and `text` (the prompt included) of each sample.
    """
    samples = []
    options = {"do_sample": True, "num_beams": 1, "temperature": 0.8, "num_return_sequences": count}
    with evaluating(model), seeded(seed, model.device):
        for prompt in prompts:
            ids = encode_prompt(tokenizer, prompt)
            for new in generate_batch(model, [ids], max_new_tokens, **options):
                samples.append({"prompt": prompt, "text": tokenizer.decode(ids + new, skip_special_tokens=True)})
    return samples
