"""Look inside: surprise, attention, logit lens, attributions and head ablation of a text, as one HTML page."""

import argparse
from pathlib import Path

from ..errors import InputError
from .common import add_model_arguments, check_text, load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, help="a sentence or two")
    parser.add_argument("--html", required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--target", type=int, metavar="N", help="explain the probability of token N, counted from 0 (the last)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    page = Path(arguments.html)
    if page.is_dir() or not page.parent.is_dir():
        raise InputError(f"--html: {page} cannot be written; name a file in a folder that exists.")
    check_text(arguments.text, "--text")
    from ..reports.explain import inspect_text
    from ..reports.page import write_page

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    data = inspect_text(model, tokenizer, arguments.text, arguments.target)
    write_page("inspect.html", {"model": arguments.model, **data}, page)
    for check, value in data["checks"].items():
        print(f"{check} {value:.2g}")
    print(f"{page}: {len(data['tokens'])} tokens, {sum(filter(None, data['bits'])):.1f} bits")
    return 0
