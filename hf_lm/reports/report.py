"""The page that a training run leaves: how it went, what it can do, what it cost, what it was made of."""

import json
import math
from itertools import chain, islice
from pathlib import Path

from datasets import Dataset

from ..data.collator import SIZE
from ..evaluation.quality import sample_quality, token_calibration
from ..files import read_json
from ..generation.decoding import continue_prompts
from ..hub.card import class_rows, compute_facts, read_recipe, shown
from ..records import read_metrics
from ..tasks import charts as task_charts
from ..tasks import result_names
from .page import write_page

POINTS = 1000  # of a curve, at most
CHARTS = {  # of every task, {title: {label: key of the log}}
    "Learning rate": {"": "learning_rate"},
    "Gradient norm": {"": "grad_norm"},
    "Tokens per second": {"": "tokens_per_second"},
}
TIMING = ("runtime", "samples_per_second", "steps_per_second")  # of an evaluation
COSTS = {  # name, divisor, unit
    "trained_seconds": ("until the model was trained", 1, "s"),
    "train_seconds": ("of that, training with evaluations and checkpoints", 1, "s"),
    "peak_memory_bytes": ("peak memory of the process until then", 1e9, "GB"),
    "total_seconds": ("the whole run", 1, "s"),
    "train_tokens_per_second": ("tokens per second of training", 1, ""),
    "peak_device_memory_bytes": ("peak memory of the device", 1e9, "GB"),
}
QUALITY = {
    "ece": "expected calibration error of the next token, held out",
    "accuracy": "top-1 accuracy",
    "confidence": "mean confidence",
    "tokens": "number of tokens",
    "repetition": "share of repeated 4-grams in a sample",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "samples": "number of samples",
    "overlap_characters": "characters of the longest stretch copied from the training text",
    "overlap": "that stretch",
    "searched_characters": "characters of the training text that were searched for it",
}
RUN = (
    "task", "kept", "base_model", "parameters", "seed", "processes", "hardware", "license", "language", "git_revision",
)  # fmt: skip
SEARCHED = 3_000_000  # characters of training text that samples are compared with
CALIBRATED = 8  # batches of held-out text
PER_PROMPT = 4  # samples


def measure_quality(trainer) -> dict:
    """Measure a language model's calibration on held-out text; for the recipe's prompts repetition, diversity, copying."""
    model, quality = trainer.model.eval(), {}
    if not (trainer.is_world_process_zero() or trainer.is_sharded) or not model.can_generate():
        return quality
    if trainer.eval_dataset is not None and trainer.args.world_size == 1:
        batches = islice(trainer.get_eval_dataloader(), CALIBRATED)
        quality = token_calibration(model, ({k: batch[k] for k in batch if k != SIZE} for batch in batches))
    if trainer.args.sample_prompts and isinstance(trainer.train_dataset, Dataset):
        args, tokenizer = trainer.args, trainer.processing_class
        found = continue_prompts(model, tokenizer, args.sample_prompts, args.sample_tokens, PER_PROMPT, args.seed)
        samples = [sample["text"].removeprefix(sample["prompt"]) for sample in found]
        text = ""
        for rows in trainer.train_dataset.select_columns("input_ids").with_format(None).iter(1000):
            text += trainer.processing_class.decode([*chain(*rows["input_ids"])], skip_special_tokens=True)
            if len(text) > SEARCHED:
                break
        quality |= sample_quality(samples, text[:SEARCHED])
        quality["searched_characters"] = len(text[:SEARCHED])
    return {name: value for name, value in quality.items() if not isinstance(value, float) or math.isfinite(value)}


def _charts(log: list[dict], task: str | None) -> list[dict]:
    drawn = []
    for title, lines in (task_charts(task) | CHARTS).items():
        series = []
        for label, key in lines.items():
            values = {row["step"]: row[key] for row in log if isinstance(row.get(key), int | float)}
            points = [[step, value] for step, value in values.items() if math.isfinite(value)]
            if points:
                thinned = points[:: math.ceil(len(points) / POINTS)]
                series.append({"label": label, "points": thinned + points[-1:] * (thinned[-1] != points[-1])})
        if series:
            drawn.append({"title": title, "series": series})
    return drawn


def _costs(metrics: dict) -> list[list]:
    predicted, actual, rows = metrics.get("predicted") or {}, {**metrics, **metrics.get("actual", {})}, []
    for key, (name, divisor, unit) in COSTS.items():
        if key in actual:
            digits = {"s": 1, "GB": 2}.get(unit, 0)
            cells = [
                f"{values[key] / divisor:,.{digits}f} {unit}".strip() if key in values else None
                for values in (predicted, actual)
            ]
            off = f"{100 * (actual[key] / predicted[key] - 1):+.0f} %" if predicted.get(key) else None
            rows.append([name, *cells, off])
    facts = compute_facts(metrics, metrics.get("parameters"))
    if "flops" in facts:
        rows.append([f"floating-point operations ({facts['flops_source']})", None, facts["flops"], None])
    if "watt_hours" in facts:
        rows.append(["energy, from the stated power", None, f"{facts['watt_hours']:.3g} Wh", None])
    return rows


def _cell(value) -> str | None:
    return None if value is None else str(shown(value))


def _results(metrics: dict) -> list[list]:
    rows, names = [], result_names(metrics.get("task"))
    for score in (metrics, *metrics.get("baselines", ())):
        start = f"{score['name']}: " if "name" in score else ""
        for key, value in score.items():
            is_score = (
                key in names or f"{key}_interval" in score or key.split("_")[0] in names or "bits_per_byte" in key
            )
            if is_score and isinstance(value, int | float):
                interval = " to ".join(map(str, map(shown, score.get(f"{key}_interval") or ()))) or None
                rows.append([start + names.get(key, key.replace("_", " ")), _cell(value), interval])
    return rows


def _evaluations(log: list[dict]) -> tuple[list, list]:
    by_step = {row["step"]: row for row in log if any(key.startswith("eval_") for key in row)}
    keys = [key for key in next(iter(by_step.values()), {}) if key.startswith("eval_") and not key.endswith(TIMING)]
    head = ["step", *(key.removeprefix("eval_").replace("_", " ") for key in keys)]
    return head, [[f"{step:,}", *(_cell(row.get(key)) for key in keys)] for step, row in sorted(by_step.items())]


def write_report(folder: Path) -> Path:
    """
    Write `report.html` from what a run has left in its folder: `metrics.json`, and where they are there
    `trainer_state.json`, `samples.jsonl`, `recipe.yaml` and `config.json`.
    """

    def listed(values: dict) -> list[list]:
        return [[key, _cell(value)] for key, value in values.items() if value is not None and key != "auto_map"]

    metrics, log = read_metrics(folder), read_json(folder / "trainer_state.json").get("log_history", [])
    quality, (head, evaluations) = metrics.get("quality", {}), _evaluations(log)
    run = {key: metrics.get(key) for key in RUN} | metrics.get("versions", {})
    per_class, confusion = ([[row[0], *map(_cell, row[1:])] for row in rows] for rows in class_rows(metrics))
    tables = [
        {"title": "Results", "head": ["", "value", "95 % interval"], "rows": _results(metrics)},
        {"title": "Classes", "head": ["", "precision", "recall", "F1", "support"], "rows": per_class},
        {
            "title": "Confusion matrix",
            "note": "A row for each true class, a column for each predicted class.",
            "head": ["", *(row[0] for row in confusion)],
            "rows": confusion,
        },
        {"title": "Evaluations on the way", "head": head, "rows": evaluations},
        {
            "title": "Quality",
            "rows": [[words, _cell(quality[key])] for key, words in QUALITY.items() if key in quality],
        },
        {"title": "Cost", "head": ["", "predicted", "actual", "difference"], "rows": _costs(metrics)},
        {"title": "Data", "rows": listed(metrics.get("data", {}))},
        {"title": "Run", "rows": listed(run)},
        {"title": "Model", "rows": listed(read_json(folder / "config.json"))},
    ]
    samples, file = {}, folder / "samples.jsonl"
    for line in file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else ():
        sample = json.loads(line)
        samples[sample["step"], sample["prompt"]] = sample  # the last step is looked at twice
    counts = f"{metrics.get('steps', 0):,} steps, {metrics.get('train_tokens', 0):,} tokens"
    data = {
        "name": folder.resolve().name,
        "summary": ", ".join(filter(None, (metrics.get("summary"), counts))),
        "charts": _charts(log, metrics.get("task")),
        "samples": list(samples.values()),
        "tables": [table for table in tables if table["rows"]],
        "recipe": read_recipe(folder / "recipe.yaml") or "",
    }
    write_page("report.html", data, folder / "report.html")
    return folder / "report.html"
