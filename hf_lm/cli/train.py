"""Train or fine-tune a model: hf-lm train CONFIG.yaml [--key value ...]. The keys are those of the YAML file."""

import argparse
import dataclasses
import sys
import textwrap

from ..data.arguments import DataArguments
from ..errors import Failure, InputError
from ..tasks import fields_of, own_keys
from ..training.keys import EVERY_RUN, NEW_MODEL, ModelArguments, TrainingKeys


def list_keys() -> str:
    """All keys of our own with what they mean, by group, and what a recipe gets that does not name them."""
    lines = ["keys, in CONFIG.yaml as key: value or here as --key value (null unsets one; recipes/ has examples):"]
    groups = {"model": dataclasses.fields(ModelArguments), "data": dataclasses.fields(DataArguments)}
    groups |= {f"data of task {' and '.join(tasks)}": fields_of(group) for group, tasks in own_keys().items()}
    groups["training"] = dataclasses.fields(TrainingKeys)
    for name, of_group in groups.items():
        lines += ["", f"{name}:"]
        for field in of_group:
            default = "" if field.default in (None, False, dataclasses.MISSING) else f" (default {field.default!r})"
            about = f"{field.metadata['help']}{default}"
            lines += textwrap.wrap(about, 118, initial_indent=f"  {field.name:28} ", subsequent_indent=" " * 31)
    defaults = {"every run": EVERY_RUN, "a new model": NEW_MODEL}
    lines += [
        "",
        "and all keys of transformers.TrainingArguments (learning_rate, max_steps, ...). Defaults measured here:",
    ]
    lines += [
        f"  {kind}: {', '.join(f'{name} {value}' for name, value in of.items())}" for kind, of in defaults.items()
    ]
    return "\n".join([*lines, "  (steps below 1 are shares of the run)"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, list_keys()
    parser.add_argument("config", metavar="CONFIG.yaml", help="the recipe")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="--key value", help="keys that win over it")


def run(arguments: argparse.Namespace) -> int:
    import hf_lm

    hf_lm.register_auto_classes()
    from transformers.utils import logging

    from ..app.run import Interrupted, keep_run_traceback, train
    from ..interop.elsewhere import where_it_runs
    from ..tasks.recipe import parse_recipe

    logging.disable_progress_bar()  # of each saved or loaded weight; the training keeps its own
    parsed = parse_recipe(arguments.config, arguments.overrides)
    try:
        metrics = train(*parsed)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_code
    except (InputError, Failure):
        raise
    except Exception as error:
        keep_run_traceback(error, parsed[2])
        raise
    if parsed[2].process_index == 0:
        summary = metrics["summary"] and metrics["summary"] + ", "
        print(
            f"{summary}{metrics['steps']:,} steps, {metrics['train_tokens']:,} tokens, "
            f"{metrics['total_seconds']:.0f} s -> {parsed[2].output_dir}"
        )
        print(where_it_runs(parsed[2].output_dir))
    return 0
