"""Translate texts by a model of the task translation; lines of standard input where no text is given."""

import argparse
import json
import sys

from ..errors import InputError
from .common import add_model_arguments, check_text, load_model, load_tokenizer, require_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to translate; none: lines of standard input")
    parser.add_argument("--to", metavar="LANGUAGE", help="as the model's pairs name it: de")
    parser.add_argument(
        "--from", dest="source", metavar="LANGUAGE", help="needed where --to alone may be several pairs"
    )
    parser.add_argument("--beams", type=int, default=4, help="beam size (4)")
    parser.add_argument("--json", action="store_true", help="print pair and translations as JSON")
    parser.parse_args = parser.parse_intermixed_args  # options may stand between MODEL and TEXT


def run(arguments: argparse.Namespace) -> int:
    if arguments.beams < 1:
        raise InputError(f"--beams: must be at least 1, got {arguments.beams}.")
    require_model(arguments.model)
    from ..evaluation.translation import choose_pair, pairs_of, translate

    tokenizer = load_tokenizer(arguments.model)
    pair = choose_pair(pairs_of(tokenizer), arguments.source, arguments.to)
    model = load_model(arguments.model, dtype=arguments.dtype)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    texts = [check_text(text, "TEXT") for text in arguments.texts]
    texts = texts or [check_text(line.rstrip("\n"), f"line {i}") for i, line in enumerate(sys.stdin, 1)]
    translations = translate(model, tokenizer, texts, pair, num_beams=arguments.beams)
    if arguments.json:
        rows = [{"source": text, "translation": found} for text, found in zip(texts, translations, strict=True)]
        print(json.dumps({"pair": pair, "beams": arguments.beams, "translations": rows}, ensure_ascii=False))
        return 0
    for translation in translations:
        print(translation)
    return 0
