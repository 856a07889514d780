"""Train or fine-tune a model: hf-lm train CONFIG.yaml [--key value ...]. The keys are those of the YAML file."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Keys: TrainingArguments' own (learning_rate, max_steps, output_dir, ...), those of upstream's "
        "language-modelling example (train_file, dataset_name, block_size, model_name_or_path, config_overrides, ...), "
        "and --overwrite, --resume. recipes/ has examples."
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="keys that win over it")


def run(arguments: argparse.Namespace) -> int:
    import hf_lm

    hf_lm.register_auto_classes()
    from transformers.utils import logging

    from ..training.arguments import parse_recipe
    from ..training.run import Interrupted, train

    logging.disable_progress_bar()  # of each saved or loaded weight; the training keeps its own
    parsed = parse_recipe(arguments.config, arguments.overrides)
    try:
        metrics = train(*parsed)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_code
    if parsed[2].process_index == 0:
        summary = metrics["summary"] and metrics["summary"] + ", "
        print(
            f"{summary}{metrics['steps']:,} steps, {metrics['train_tokens']:,} tokens, "
            f"{metrics['total_seconds']:.0f} s -> {parsed[2].output_dir}"
        )
    return 0
