"""Merge an adapter into the weights of its base model: a folder as any other, without peft."""

import argparse
from pathlib import Path

from .common import load_tokenizer
from .import_ import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("output", metavar="DST", help="folder that receives the model; must not exist yet")
    parser.add_argument("--base", help="the base model's folder or Hub id (the one the adapter names)")


def run(arguments: argparse.Namespace) -> int:
    from ..interop.adapters import base_of, merge_adapter
    from ..interop.convert import save, staged

    with staged(arguments.output) as folder:
        own = any((Path(arguments.adapter) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        tokenizer = load_tokenizer(arguments.adapter if own else arguments.base or base_of(arguments.adapter))
        model, report = merge_adapter(arguments.adapter, arguments.base, tokenizer)
        if model.config.pad_token_id is None:  # of a classifier: where a text ends
            model.config.pad_token_id = tokenizer.pad_token_id
        save(folder, model, tokenizer)
    report |= {"format": "merged", "dtype": str(model.dtype).removeprefix("torch.")}
    return show(report, arguments.output, as_json=False)
