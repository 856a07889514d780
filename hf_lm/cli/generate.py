"""Continue a prompt; the text appears as it is made."""

import argparse
import json
import sys

from ..errors import InputError
from .common import add_model_arguments, check_text, load_model, load_tokenizer


def add_sampling_arguments(parser: argparse.ArgumentParser, temperature: float) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=200, help="length at most (200)")
    parser.add_argument("--temperature", type=float, default=temperature, help=f"0: greedy decoding ({temperature:g})")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability that is sampled from (0.95)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text (drawn)")


def sampling_settings(arguments: argparse.Namespace) -> dict:
    """
    Return the settings of `generate()` that the arguments ask for.

    Raises:
        InputError: an argument is out of its range.
    """
    if arguments.temperature < 0:
        raise InputError(f"--temperature: must be 0 or more, got {arguments.temperature}.")
    if not 0 < arguments.top_p <= 1:
        raise InputError(f"--top-p: must be more than 0 and at most 1, got {arguments.top_p}.")
    if arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: must be at least 1, got {arguments.max_new_tokens}.")
    from ..generation.decoding import decoding_settings

    return decoding_settings(arguments.temperature, arguments.top_p)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto")
    parser.add_argument("--prompt", default="", help="what to continue; empty: the start of a text")
    add_sampling_arguments(parser, temperature=0.8)
    parser.add_argument("--int8", action="store_true", help="8-bit weights on an x86 CPU: faster, less exact")
    parser.add_argument("--prompt-lookup", type=int, metavar="N", help="guess N tokens at a time from the prompt")
    parser.add_argument("--json", action="store_true", help="print prompt, text and number of tokens as JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.prompt_lookup is not None and arguments.prompt_lookup < 1:
        raise InputError(f"--prompt-lookup: must be at least 1, got {arguments.prompt_lookup}.")
    check_text(arguments.prompt, "--prompt")
    settings = sampling_settings(arguments)
    import torch
    from transformers import TextStreamer

    from ..generation.decoding import generate_batch
    from ..generation.packed import optimize_where_it_pays
    from ..generation.prompts import context_limit, encode_prompt, room_for_answer

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    ids = encode_prompt(tokenizer, arguments.prompt)
    room = room_for_answer(model, ids, arguments.max_new_tokens, "--prompt")
    if room < arguments.max_new_tokens:
        print(f"The model takes {context_limit(model)} tokens: {room} new ones at most.", file=sys.stderr)
    seed = None
    if settings["do_sample"]:
        seed = torch.seed() if arguments.seed is None else arguments.seed
        torch.manual_seed(seed)
    optimize_where_it_pays(model, arguments.int8)
    streamer = None if arguments.json else TextStreamer(tokenizer, skip_special_tokens=True)
    settings |= {"prompt_lookup_num_tokens": arguments.prompt_lookup, "streamer": streamer}
    (new,) = generate_batch(model, [ids], room, **settings)
    if arguments.json:
        text = tokenizer.decode(ids + new, skip_special_tokens=True)
        result = {"prompt": arguments.prompt, "text": text, "new_tokens": len(new), "seed": seed}
        print(json.dumps(result, ensure_ascii=False))
    return 0
