"""The log-probability of sentences and of each of their tokens."""

import argparse
import json

from .common import load_model, load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id")
    parser.add_argument("sentences", nargs="+", metavar="SENTENCE")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..evaluation.sentences import score_sentences

    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    scores = score_sentences(model, tokenizer, arguments.sentences)
    if arguments.json:
        print(json.dumps([score.to_dict() for score in scores], ensure_ascii=False))
        return 0
    for score in scores:
        print(f"{score.log_probability:9.3f} nats  {score.bits_per_byte:.3f} bits per byte  {score.sentence}")
        for token, value in zip(score.tokens, score.token_log_probabilities, strict=True):
            print(f"{value:9.3f}   {token!r}")
    return 0
