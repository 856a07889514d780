"""Take a LoRA adapter into the weights of its base model: a folder as any other, without peft."""

import argparse
from pathlib import Path

from ..errors import InputError
from .common import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("output", metavar="DST", help="folder that receives the model; must not exist yet")
    parser.add_argument("--base", help="the base model's folder or Hub id (the one the adapter names)")


def run(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    if output.exists():
        raise InputError(f"DST: {output} exists already; name a new folder.")
    import hf_lm

    hf_lm.register_auto_classes()
    from ..training.adapters import merge_adapter

    model, tokenizer = merge_adapter(arguments.adapter, arguments.base), load_tokenizer(arguments.adapter)
    if model.config.pad_token_id is None:  # of a classifier: where a text ends
        model.config.pad_token_id = tokenizer.pad_token_id
    aside = output.with_name(f".{output.name}.saving")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(output)
    print(f"merged -> {output}")
    return 0
