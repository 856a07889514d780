"""Which way each reported metric improves, which of them chooses the best checkpoint, and metrics of whole sets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import EvalPrediction

from ..data.collator import SIZE
from ..data.packing import IGNORED
from ..errors import InputError
from ..evaluation.text import TextScore, token_log_probabilities

# metric: whether a greater value is better; None for what counts or times and says nothing of the model.
GREATER_IS_BETTER: dict[str, bool | None] = {
    "loss": False, "perplexity": False, "bits_per_byte": False, "control_bits_per_byte": False, "ece": False,
    "accuracy": True, "balanced_accuracy": True, "precision": True, "recall": True, "f1": True, "macro_f1": True,
    "macro_precision": True, "macro_recall": True, "weighted_f1": True, "mcc": True, "chrf": True, "bleu": True,
    "self_ended": True, "confidence": None, "repetition": False, "distinct_1": True, "distinct_2": True, "overlap": None,
    "overlap_characters": False, "searched_characters": None, "samples": None, "tokens": None, "examples": None,
    "answers": None, "num_beams": None, "runtime": None, "samples_per_second": None, "steps_per_second": None,
    "model_preparation_time": None,
}  # fmt: skip
PARTS = ("_low", "_high", "_interval", "_before")  # of a metric: an end of its interval, its value before training
LANGUAGE_MODELING = ("loss", "perplexity", "tokens")  # of every set; and, where the bytes of its rows are known:
BITS_PER_BYTE = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high")


def is_known(name: str) -> bool:
    """Whether the table has a metric."""
    return _entry(name) is not None


def _entry(name: str) -> str | None:
    name = name.removeprefix("eval_").partition("/")[0]  # chrf/en-de, f1/positive
    for part in PARTS:
        name = name.removesuffix(part)
    # A metric of one of several sets begins with the set's name.
    fitting = [known for known in GREATER_IS_BETTER if name == known or name.endswith(f"_{known}")]
    return max(fitting, key=len, default=None)


def greater_is_better(name: str) -> bool | None:
    """
    Whether a greater value of a metric is better; None if that is not known, or if it is no measure of quality.

    Args:
        name: with or without `eval_`, the name of the set, or what follows a `/`.
    """
    return GREATER_IS_BETTER.get(_entry(name))


def decide_direction(metric: str, given: bool | None) -> bool:
    """
    The `greater_is_better` of a run.

    Raises:
        InputError: nothing says it, or what is given contradicts the table.
    """
    known = greater_is_better(metric)
    if given is None and known is None:
        raise InputError(
            f"metric_for_best_model: it is not known whether a greater {metric} is better; add greater_is_better: true "
            "or false."
        )
    if given is not None and known is not None and given != known:
        raise InputError(f"greater_is_better: {metric} is better when {'greater' if known else 'less'}; leave it out.")
    return known if given is None else given


def require_reported(metric: str | None, reported: tuple[str, ...]) -> None:
    """
    Raises:
        InputError: evaluations do not report the metric that chooses the best checkpoint.
    """
    if metric is not None and metric.removeprefix("eval_") not in reported:
        names = [name for name in reported if GREATER_IS_BETTER.get(_entry(name)) is not None]
        raise InputError(f"metric_for_best_model: {metric} is not reported; possible are {', '.join(names)}.")


@contextmanager
def missing_metric_explained() -> Iterator[None]:
    """
    Raises:
        InputError: instead of transformers' `KeyError` about a `metric_for_best_model` that an evaluation did not report.
    """
    try:
        yield
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise InputError(f"metric_for_best_model: {error.args[0]}") from error


class WholeSet:
    """
    A `compute_metrics` that always sees the whole set: batch by batch with `batch_eval_metrics`, and as a list of batches
    with `eval_do_concat_batches=False`, transformers gives it parts.
    """

    def __init__(self, compute: Callable[[EvalPrediction], dict[str, float]]):
        self.compute = compute
        self.reset()

    def __call__(self, rows: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        for values, part in zip(self.parts, (rows.predictions, rows.label_ids), strict=True):
            batches = part if isinstance(part, list) else [part]
            values += [nested_numpify(batch) if torch.is_tensor(batch) else batch for batch in batches]
        if not compute_result:
            return {}
        predictions, labels = map(np.concatenate, self.parts)
        self.reset()
        return self.compute(EvalPrediction(predictions, labels))

    def reset(self) -> None:
        """Forget the parts of an evaluation that did not end."""
        self.parts: tuple[list, list] = ([], [])


def language_modeling_metrics(rows: EvalPrediction) -> dict[str, float]:
    """
    Loss (nats per token), perplexity and, where the sizes are known, bits per byte with its 95% interval.

    Args:
        rows: as `row_likelihoods` gives them: nats `(rows,)`, and tokens and bytes `(rows, 2)`.
    """
    nats, (tokens, sizes) = rows.predictions.astype("float64").tolist(), rows.label_ids.T.tolist()
    score = TextScore(nats, tokens, sizes, [0] * len(nats))  # blocks in order, as of one text
    metrics = {"loss": score.loss, "perplexity": score.perplexity, "tokens": sum(tokens)}
    if any(sizes):
        low, high = score.interval()
        metrics |= {"bits_per_byte": score.bits_per_byte, "bits_per_byte_low": low, "bits_per_byte_high": high}
    return metrics


@torch.no_grad()
def row_likelihoods(
    model: nn.Module, inputs: dict[str, torch.Tensor], with_sizes: bool
) -> tuple[None, torch.Tensor, torch.Tensor]:
    """
    Of each row of a batch the negative log-likelihood of its labels, in nats, `(rows,)`, and their number `(rows,)`, in
    the form of a `prediction_step`.

    Args:
        with_sizes: beside that number, the UTF-8 bytes they cover (0 where unknown): `(rows, 2)`.
    """
    inputs = dict(inputs)
    sizes = inputs.pop(SIZE, None)
    nats = -token_log_probabilities(model, **inputs).sum(dim=1)
    tokens = (inputs["labels"][:, 1:] != IGNORED).sum(dim=1)
    if not with_sizes:
        return None, nats, tokens
    if sizes is None:
        sizes = torch.zeros_like(tokens)
    elif len(sizes) != len(tokens):  # a collator that makes one long row of all
        sizes = sizes.sum().expand(len(tokens))
    return None, nats, torch.stack([tokens, sizes], dim=1)


def reported_metrics(held_out) -> tuple[str, ...]:
    """
    Names of the metrics that a language model's evaluations report.

    Args:
        held_out: a dataset, or several by name.
    """
    names = []
    for name, rows in (held_out if isinstance(held_out, dict) else {"": held_out}).items():
        columns = getattr(rows, "column_names", None)
        found = LANGUAGE_MODELING + (BITS_PER_BYTE if columns is None or SIZE in columns else ())
        names += [f"{name}_{metric}" if name else metric for metric in found]
    return tuple(names)
