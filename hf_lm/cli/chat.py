"""Talk to a model in the terminal: answers stream, the conversation is remembered. /new starts over, Ctrl-D ends."""

import argparse
import sys

from ..errors import InputError
from .common import add_model_arguments, check_text, load_model, load_tokenizer
from .generate import add_sampling_arguments, sampling_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, dtype="auto")
    parser.add_argument("--system", help="a system message in front of every conversation")
    add_sampling_arguments(parser, temperature=0.0)


def run(arguments: argparse.Namespace) -> int:
    settings = sampling_settings(arguments)
    check_text(arguments.system or "", "--system")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # one wrong byte does not end the conversation
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    import torch
    from transformers import TextStreamer

    from ..generation.conversation import check_template, fit_conversation
    from ..generation.decoding import generate_batch
    from ..generation.packed import optimize_where_it_pays
    from ..generation.prompts import context_limit

    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    if not tokenizer.chat_template:
        raise InputError(f"{arguments.model}: its tokenizer has no chat template; use hf-lm generate.")
    check_template(tokenizer)
    optimize_where_it_pays(model)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    settings["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages = list(opening)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if text == "/new":
            messages = list(opening)
        if not text or text == "/new":
            continue
        messages.append({"role": "user", "content": text})
        try:
            check_text(text, "the message")
            kept, ids, room = fit_conversation(tokenizer, messages, context_limit(model), arguments.max_new_tokens)
        except InputError as error:  # one message that cannot be answered does not end the conversation
            print(error, file=sys.stderr)
            messages.pop()
            continue
        if left_out := len(messages) - len(kept):
            print(
                f"The conversation outgrows the model: its oldest {left_out} messages are left out.", file=sys.stderr
            )
            messages = kept
        (new,) = generate_batch(model, [ids], room, **settings)
        messages.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True).strip()})
