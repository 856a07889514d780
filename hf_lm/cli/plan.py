"""What a recipe will cost: parameters, operations, memory, time, energy, money; on this machine or another."""

import argparse
import json


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hardware", default="this", help="this (some steps are timed), H100, H200, A100 or 4090")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of these devices (1)")
    parser.add_argument("--price", type=float, metavar="X", help="of a device for an hour, in any currency")
    parser.add_argument(
        "--utilization", type=float, metavar="SHARE", help="of the peak that other hardware reaches (0.35)"
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="90s, 30min, 2h: choose size, vocabulary, batch and steps for it, on this machine",
    )
    parser.add_argument("--json", action="store_true", help="all numbers, as JSON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    add_options(parser)
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="--key value", help="keys that win over the recipe's"
    )


def run(arguments: argparse.Namespace) -> int:
    options = argparse.ArgumentParser(allow_abbrev=False)  # those that come after the recipe
    add_options(options)
    _, overrides = options.parse_known_args(arguments.rest, arguments)
    import hf_lm

    hf_lm.register_auto_classes()
    from transformers.utils import logging

    from ..planning import scaling
    from ..planning.plan import UTILIZATION, as_text, plan
    from ..tasks.recipe import parse_recipe

    logging.disable_progress_bar()
    share = UTILIZATION if arguments.utilization is None else arguments.utilization
    recipe = parse_recipe(arguments.config, overrides)
    if arguments.budget is not None:
        choice = scaling.choose(*recipe, scaling.seconds_of(arguments.budget))
        words = [arguments.config, *overrides]
        print(json.dumps(choice, indent=2) if arguments.json else scaling.in_words(choice, words))
        return 0
    costs = plan(*recipe, arguments.hardware, arguments.gpus, arguments.price, share)
    print(json.dumps(costs, indent=2) if arguments.json else as_text(costs))
    return 0
