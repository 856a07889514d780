"""Continue a prompt; the text appears as it is made."""

import argparse
import json
import sys

from ..errors import InputError
from .common import add_model_arguments, check_text, load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto")
    parser.add_argument("--prompt", default="", help="what to continue; empty: the start of a text")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="length at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time (0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability that is sampled from (0.95)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text (drawn)")
    parser.add_argument("--int8", action="store_true", help="8-bit weights on an x86 CPU: faster, less exact")
    parser.add_argument("--prompt-lookup", type=int, metavar="N", help="guess N tokens at a time from the prompt")
    parser.add_argument("--json", action="store_true", help="print prompt, text and number of tokens as JSON")


def check(arguments: argparse.Namespace) -> None:
    if arguments.temperature < 0:
        raise InputError(f"--temperature: must be 0 or more, got {arguments.temperature}.")
    if not 0 < arguments.top_p <= 1:
        raise InputError(f"--top-p: must be more than 0 and at most 1, got {arguments.top_p}.")
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: must be at least 1, got {arguments.max_new_tokens}.")
    if getattr(arguments, "prompt_lookup", None) is not None and arguments.prompt_lookup < 1:  # hf-lm chat has none
        raise InputError(f"--prompt-lookup: must be at least 1, got {arguments.prompt_lookup}.")


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    check_text(arguments.prompt, "--prompt")
    import torch
    from transformers import TextStreamer

    from ..generation.packed import optimize_where_it_pays
    from ..generation.prompts import encode_prompt

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    ids = encode_prompt(tokenizer, arguments.prompt)
    if not ids:
        raise InputError("--prompt: must not be empty, because the tokenizer has no token that starts a text.")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) >= limit:
        raise InputError(f"--prompt: has {len(ids)} tokens; the model takes {limit}, the new ones included.")
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    seed = None
    if arguments.temperature > 0:
        seed = torch.seed() if arguments.seed is None else arguments.seed
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    room = arguments.max_new_tokens if limit is None else min(arguments.max_new_tokens, limit - len(ids))
    if room < arguments.max_new_tokens:
        print(f"The model takes {limit} tokens: {room} new ones at most.", file=sys.stderr)
    optimize_where_it_pays(model, arguments.int8)
    input_ids = torch.tensor([ids], device=model.device)
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=room,
        prompt_lookup_num_tokens=arguments.prompt_lookup,
        streamer=None if arguments.json else TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
    if arguments.json:
        text = tokenizer.decode(output[0], skip_special_tokens=True)
        new_tokens = output.shape[1] - len(ids)
        result = {"prompt": arguments.prompt, "text": text, "new_tokens": new_tokens, "seed": seed}
        print(json.dumps(result, ensure_ascii=False))
    return 0
