"""Accuracy, macro-averaged precision, recall and F1, and calibration of a classifier as one `evaluate.Metric`."""

import evaluate
import numpy as np
from datasets import Features, List, Value

from hf_lm.errors import InputError
from hf_lm.evaluation.quality import expected_calibration_error

SCORES = ("accuracy", "macro_precision", "macro_recall", "macro_f1")


def count_confusions(references: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """Confusion matrix `(classes, classes)` of class numbers: a row for each true class, a column for each predicted."""
    return np.bincount(references * classes + predictions, minlength=classes**2).reshape(classes, classes)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """
    `precision`, `recall`, `f1` and `support` (the number of examples) of each class.

    A score is 0 where its denominator is: precision of a class never predicted, recall of a class without examples.
    """
    hits, support, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        "precision": hits / np.maximum(predicted, 1),
        "recall": hits / np.maximum(support, 1),
        "f1": 2 * hits / np.maximum(support + predicted, 1),
        "support": support,
    }


class HfLmClassification(evaluate.Metric):
    """
    `accuracy`, `macro_precision`, `macro_recall` and `macro_f1` with 95% percentile bootstrap intervals over the
    examples, and the expected calibration error (15 bins of equal width) of the most likely class's probability.

    Macro averages are over the classes that occur among references or predictions.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: the probability of each class; references: class numbers",
            features=Features({"predictions": List(Value("float64")), "references": Value("int64")}),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], samples: int = 1000, seed: int = 0
    ) -> dict:
        probabilities, truth = np.asarray(predictions), np.asarray(references)
        classes = probabilities.shape[1]
        if (probabilities < 0).any() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
            raise InputError("predictions: must be probabilities that add up to 1 in each row (apply a softmax).")
        if truth.min() < 0 or truth.max() >= classes:
            raise InputError(f"references: must be between 0 and {classes - 1}, got {truth.min()} to {truth.max()}.")
        chosen = probabilities.argmax(axis=1)
        random = np.random.default_rng(seed)
        picks = [np.arange(len(truth)), *random.integers(0, len(truth), (samples, len(truth)))]
        scores = np.array([self._scores(truth[pick], chosen[pick], classes) for pick in picks])
        result = {}
        for name, (value, *resampled) in zip(SCORES, scores.T, strict=True):
            low, high = np.quantile(resampled, (0.025, 0.975))
            result |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
        return result | {"ece": expected_calibration_error(probabilities.max(axis=1), chosen == truth)}

    @staticmethod
    def _scores(truth: np.ndarray, chosen: np.ndarray, classes: int) -> tuple[float, ...]:
        """The values of `SCORES`."""
        confusion = count_confusions(truth, chosen, classes)
        seen = confusion.sum(axis=0) + confusion.sum(axis=1) > 0
        by_class = class_scores(confusion)
        macro = (by_class[name][seen].mean() for name in ("precision", "recall", "f1"))
        return confusion.trace() / len(truth), *macro
