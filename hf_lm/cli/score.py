"""The log-probability of sentences and of each of their tokens."""

import argparse
import json
import math

from .common import add_model_arguments, check_text, load_model, load_tokenizer

BIT = math.log(2)  # nats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("sentences", nargs="+", metavar="SENTENCE")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    sentences = [check_text(sentence, "SENTENCE") for sentence in arguments.sentences]
    from ..evaluation.sentences import score_sentences

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype), load_tokenizer(arguments.model)
    scores = score_sentences(model, tokenizer, sentences)
    if arguments.json:
        print(json.dumps([score.to_dict() for score in scores], ensure_ascii=False))
        return 0
    for score in scores:
        nats = score.log_probability
        print(f"{nats:.3f} nats, {-nats / BIT:.2f} bits, {score.bits_per_byte:.3f} bits per byte: {score.sentence}")
        for token, value in zip(score.tokens, score.token_log_probabilities, strict=True):
            print(f"{value:9.3f} nats {-value / BIT:7.2f} bits  {'#' * min(round(-value / BIT), 24):24}  {token!r}")
    return 0
