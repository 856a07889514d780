"""
`metrics.json`: the typed record of a run. Training writes it; cards, reports, adapters and later runs read it.

A record without `version` is one of hf_lm 0.1.0; its entries are the same.
"""

from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, get_args, get_type_hints, is_typeddict

from .errors import InputError
from .files import read_json, write_json

METRICS_FILE = "metrics.json"
VERSION = 1


class Data(TypedDict, total=False):
    """What a run was trained on; bytes are UTF-8 bytes of text."""

    train_file: str | None
    validation_file: str | None
    dataset_name: str | None
    license: str | None
    language: str | list | None
    sha256: str | None
    train_bytes: int | None
    validation_bytes: int | None


class Metrics(TypedDict, total=False):
    """
    The entries of `metrics.json` that every run may have. A task's scores stand beside them: `<name>`, with its
    confidence interval `<name>_interval` and its parts `<name>/<part>`; the task's `result_names` say which.
    """

    version: int
    task: str
    summary: str
    model_name: str
    split: str
    # How training went. Losses are in nats per token.
    steps: int
    divergences: int
    train_loss: float | None
    train_tokens: int
    kept: str
    seed: int
    # What it took: seconds, bytes, floating-point operations, joules.
    parameters: int
    predicted: dict | None
    actual: dict | None
    train_seconds: float
    train_tokens_per_second: float
    total_seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int
    total_flos: float
    train_flops: float
    energy_joules: float
    model_flops_utilization: float | None
    processes: int
    hardware: str | None
    # What it was made of.
    data: Data
    base_model: str | dict | None
    license: str | None
    language: str | list | None
    git_revision: str | None
    versions: dict
    # Measured besides the task's scores.
    quality: dict
    baselines: list
    labels: list | None
    per_class: dict
    confusion_matrix: list


def _check(where: str, record: dict, schema: type) -> None:
    for name, kind in get_type_hints(schema).items():
        if name not in record:
            continue
        value, is_nested = record[name], is_typeddict(kind)
        kinds = get_args(kind) if isinstance(kind, UnionType) else (dict if is_nested else kind,)
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
            raise InputError(f"{where}{name} must be {expected}, got {value!r:.80}.")
        if is_nested:
            _check(f"{where}{name}.", value, kind)


def read_metrics(folder: Path) -> Metrics:
    """
    The record of the run in a folder; `{}` if there is none.

    Raises:
        InputError: it is damaged, holds a NaN or an entry of another type, or is of a newer hf_lm.
    """
    path = folder / METRICS_FILE
    record: Any = read_json(path, strict=True)
    _check(f"{path}: ", record, Metrics)
    if record.get("version", 0) > VERSION:
        raise InputError(f"{path}: is of version {record['version']}; this hf_lm reads up to {VERSION}. Update hf_lm.")
    return record


def write_metrics(folder: Path, metrics: Metrics) -> None:
    """Write the record of a run, atomically."""
    write_json(folder / METRICS_FILE, {"version": VERSION, **metrics})
