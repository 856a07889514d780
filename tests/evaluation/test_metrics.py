"""Metric classes: by import, by `evaluate.load(path)`, without a network."""

import math

import evaluate
import numpy as np
import pytest

from hf_lm.errors import InputError
from hf_lm.evaluation.metrics import HfLmBitsPerByte, HfLmClassification, HfLmPerplexity
from hf_lm.evaluation.metrics.classification import class_scores, count_confusions
from hf_lm.evaluation.text import score_documents


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(path / "metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", path / "modules")
        yield


@pytest.mark.parametrize(
    ("metric", "file", "keys"),
    [
        (HfLmBitsPerByte, "bits_per_byte", ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "bytes")),
        (HfLmPerplexity, "perplexity", ("perplexity", "loss", "tokens")),
    ],
)
def test_text_metrics_give_the_evaluators_numbers(repository, folder, model, tokenizer, moby_dick, metric, file, keys):
    texts = [moby_dick[:500], moby_dick[700:900]]
    expected = score_documents(model, tokenizer, texts).summary()
    loaded = evaluate.load(str(repository / "hf_lm" / "evaluation" / "metrics" / f"{file}.py"))
    assert type(loaded).__name__ == metric.__name__
    results = [
        metric().compute(predictions=texts, model=folder),
        metric().compute(predictions=texts, model=model, tokenizer=tokenizer, batch_size=1),
        loaded.compute(predictions=texts, model=folder),
    ]
    for result in results:
        assert all(math.isclose(result[key], expected[key], rel_tol=1e-5) for key in keys)
    with pytest.raises(InputError, match="tokenizer"):
        metric().compute(predictions=texts, model=model)


def test_classification_scores_are_those_counted_by_hand(repository):
    predictions = [[0.9, 0.1, 0], [0.8, 0.2, 0], [0.3, 0.7, 0], [0.4, 0.6, 0]]
    references = [0, 1, 1, 1]
    path = str(repository / "hf_lm" / "evaluation" / "metrics" / "classification.py")
    for metric in (HfLmClassification(), evaluate.load(path)):
        result = metric.compute(predictions=predictions, references=references)
        assert result["accuracy"] == 0.75
        # class 0: 1 hit of 1 wanted, 2 given; class 1: 2 hits of 3 wanted, 2 given; class 2 does not occur
        assert math.isclose(result["macro_f1"], (2 / 3 + 4 / 5) / 2)
        assert math.isclose(result["macro_precision"], (1 / 2 + 1) / 2)
        assert math.isclose(result["macro_recall"], (1 + 2 / 3) / 2)
        assert math.isclose(result["ece"], (0.1 + 0.8 + 0.3 + 0.4) / 4)
        assert result["accuracy_low"] <= 0.75 <= result["accuracy_high"]
        assert result["macro_f1_low"] <= result["macro_f1"] <= result["macro_f1_high"]


def test_class_scores_are_those_of_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    truth, chosen = (
        random.integers(0, 3, 50),
        random.integers(1, 4, 50),
    )  # 0 is never predicted, 3 never true, 4 neither
    confusion = count_confusions(truth, chosen, 5)
    assert (confusion == sklearn_metrics.confusion_matrix(truth, chosen, labels=range(5))).all()
    expected = sklearn_metrics.precision_recall_fscore_support(truth, chosen, labels=range(5), zero_division=0)
    for values, other in zip(class_scores(confusion).values(), expected, strict=True):
        assert np.allclose(values, other)
    macro = sklearn_metrics.precision_recall_fscore_support(truth, chosen, average="macro", zero_division=0)
    result = HfLmClassification().compute(predictions=np.eye(5)[chosen], references=truth, samples=1)
    assert np.allclose([result[f"macro_{name}"] for name in ("precision", "recall", "f1")], macro[:3])


def test_classification_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        truth = random.integers(0, 2, 200)
        right = random.random(200) < 0.8
        predictions = np.where((truth == right)[:, None], [0.1, 0.9], [0.9, 0.1])
        predictions = np.stack([1 - predictions[:, 1], predictions[:, 1]], axis=1)
        result = HfLmClassification().compute(predictions=predictions, references=truth, samples=200)
        covered += result["accuracy_low"] <= 0.8 <= result["accuracy_high"]
    assert covered >= 50


def test_logits_and_unknown_classes_are_refused():
    with pytest.raises(InputError, match="softmax"):
        HfLmClassification().compute(predictions=[[2.0, -1.0]], references=[0])
    with pytest.raises(InputError, match="between 0 and 1, got 2"):
        HfLmClassification().compute(predictions=[[0.5, 0.5]], references=[2])
