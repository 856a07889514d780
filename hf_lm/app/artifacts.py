"""What a finished run leaves: metrics.json, the loss curve, the card, the recipe with every key."""

import subprocess
import sys
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers.trainer import TRAINING_ARGS_NAME

from ..data.documents import data_sha256
from ..errors import CRASH_FILE
from ..files import write_text
from ..hardware import describe_hardware, peak_memory
from ..hub.card import write_card
from ..records import write_metrics
from ..reports.curve import plot_loss_curve
from ..reports.report import write_report
from ..training.keys import defaults_of_run
from ..training.recipe_file import write_yaml
from ..training.trainer import HfLmTrainer

RECIPE_FILE = "recipe.yaml"  # what a folder must hold to count as one of our runs
PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "hf-lm")
# Not part of a recipe: what is asked of one run of it, and what the machine decides.
NOT_IN_RECIPE = {
    "overwrite", "resume", "resume_from_checkpoint", "allow_changes", "restart_missing_state", "use_cpu", "do_eval",
}  # fmt: skip


def recipe_of(model_arguments, data_arguments, training_arguments) -> dict:
    """The keys that a recipe must have to run the same: those that differ from what an empty recipe would get."""
    recipe = {}
    of_run = defaults_of_run(model_arguments.model_name_or_path is None, {})
    for group in (model_arguments, data_arguments, training_arguments):
        default = type(group)()
        for field in fields(group):
            value, usual = (
                getattr(getattr(of, field.name), "value", getattr(of, field.name)) for of in (group, default)
            )
            plain = isinstance(value, str | int | float | bool | list | dict) or field.name in of_run
            differs = value != usual or value != of_run.get(field.name, usual)
            if plain and differs and field.init and field.name not in NOT_IN_RECIPE:
                recipe[field.name] = value
    return recipe


def write_recipe(folder: Path, recipe: dict) -> None:
    """Keep the recipe in the output folder."""
    write_text(folder / RECIPE_FILE, write_yaml(recipe))


def git_revision() -> str | None:
    """The commit this package was run from, if it was run from a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(
    trainer: HfLmTrainer, model_arguments, data_arguments, language: str | list[str] | None, seconds: float
) -> dict:
    """
    What was run, on what, with what: everything in metrics.json that is not a score.

    Args:
        language: of the text.
        seconds: wall-clock time of the whole run, data and evaluation included.
    """
    digest, stated = data_sha256(data_arguments), data_arguments.data_sha256
    is_stated = stated in (None, digest)  # else the recipe was copied, and speaks of other data
    if not is_stated:
        message = (
            f"data_sha256: {stated[:8]}... is not that of the data ({digest or 'not files'}): the card gets neither"
        )
        print(
            f"{message} data_license nor language. State those of your data, and remove data_sha256.", file=sys.stderr
        )
    arguments, blocks, held_out = trainer.args, trainer.train_dataset, trainer.eval_dataset
    facts = {
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.state.global_step,
        "divergences": trainer.progress.divergences,
        "train_tokens": trainer.progress.tokens,
        "train_seconds": trainer.progress.seconds,
        "train_tokens_per_second": trainer.progress.tokens / max(trainer.progress.seconds, 1e-9),
        "total_seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "total_flos": trainer.state.total_flos,
        "seed": arguments.seed,
        "processes": arguments.world_size,
        "hardware": describe_hardware(arguments.device),
        "license": model_arguments.license,
        "language": language if is_stated else None,
        "git_revision": git_revision(),
        "data": {
            "train_file": ", ".join(data_arguments.train_file or []) or None,
            "validation_file": ", ".join(data_arguments.validation_file or []) or None,
            "dataset_name": data_arguments.dataset_name,
            "license": data_arguments.data_license if is_stated else None,
            "sha256": digest,
            "train_bytes": int(sum(blocks["num_bytes"])) if isinstance(blocks, Dataset) else None,
            "validation_bytes": int(sum(held_out["num_bytes"])) if isinstance(held_out, Dataset) else None,
        },
        "versions": {name: version(name) for name in PACKAGES},
    }
    state, metric = trainer.state, arguments.metric_for_best_model
    if arguments.load_best_model_at_end and state.best_model_checkpoint:
        better = "greater" if arguments.greater_is_better else "less"
        facts["kept"] = f"step {state.best_global_step}: best {metric} ({state.best_metric:.4g}, {better} is better)"
    if model_arguments.model_name_or_path is not None:
        facts["base_model"] = {"id": model_arguments.model_name_or_path}
        if digest := getattr(trainer.model, "base_sha256", None):  # an adapter fits these weights only
            facts["base_model"]["sha256"] = digest
    if arguments.device.type == "cuda":
        facts["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
        facts["model_flops_utilization"] = trainer.utilization(facts["train_tokens_per_second"])
    return facts


def save_run(trainer: HfLmTrainer, metrics: dict) -> None:
    """Write everything that the finished folder holds, and push it if that is asked for."""
    folder = Path(trainer.args.output_dir)
    trainer.model.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle; recipe.yaml says the same
        (folder / CRASH_FILE).unlink(missing_ok=True)
        write_metrics(folder, metrics)
        plot_loss_curve(trainer.state.log_history, folder / "loss_curve.png")
        write_card(folder)
        write_report(folder)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="End of training")
