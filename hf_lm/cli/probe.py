"""Does it know English grammar? Minimal pairs from real sentences, against chance and a trigram model."""

import argparse
import json

from ..errors import InputError
from .common import add_model_arguments, load_model, load_tokenizer
from .evaluate import add_data_arguments, load_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser)
    parser.add_argument("--last-percent", type=float, default=10, metavar="P", help="pairs come from the last P per cent, held out from training; the trigram model knows what is before (10)")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=100, help="pairs of a kind at most (100)")
    parser.add_argument("--json", action="store_true", help="print the result, with the pairs it failed, as JSON")


def run(arguments: argparse.Namespace) -> int:
    if arguments.pairs < 1:
        raise InputError(f"--pairs: must be at least 1, got {arguments.pairs}.")
    if not 0 < arguments.last_percent < 100:
        raise InputError(f"--last-percent: must be between 0 and 100, got {arguments.last_percent}.")
    from ..evaluation.probe import probe

    earlier, text = ("\n\n".join(rows["text"]) for rows in load_data(arguments).values())
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    result = probe(model, tokenizer, text, earlier, arguments.pairs)
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
        return 0
    print(f"{'':14}{'pairs':>6}   {'model':22}{'trigrams':22}chance")
    for rule, row in result.items():
        cells = ("{accuracy:6.1%} ({low:.0%} to {high:.0%})".format(**row[who]) for who in ("model", "trigrams"))
        print(f"{rule:14}{row['pairs']:6}   " + "".join(f"{cell:22}" for cell in cells) + " 50.0%")
    return 0
