"""Calibration, repetition, diversity, copied passages: against counts by hand and brute force."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lm.evaluation.quality import (
    distinct_n,
    expected_calibration_error,
    longest_overlap,
    repetition,
    sample_quality,
    token_calibration,
)


def test_calibration_error_is_the_gap_of_each_bin_weighted_by_its_size():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([1, 1, 1, 0, 0, 1])
    assert math.isclose(expected_calibration_error(confidence, correct, bins=10), (4 * 0.2 + 2 * 0.05) / 6)
    random = np.random.default_rng(0)
    confidence = random.random(100_000)
    assert expected_calibration_error(confidence, random.random(100_000) < confidence) < 0.01
    assert expected_calibration_error(np.ones(3), np.ones(3)) == 0


def test_token_calibration_is_that_of_the_models_own_guesses(model, tokenizer):
    text = "Call me Ishmael. Some years ago"
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        confidence, guess = model(ids).logits[0, :-1].softmax(-1).max(-1)
    padded = torch.nn.functional.pad(ids, (0, 5))
    labels = padded.masked_fill(torch.arange(padded.shape[1]) >= ids.shape[1], -100)
    result = token_calibration(model, [{"input_ids": padded, "labels": labels, "max_length_q": 3}] * 2)  # no tensor
    assert result["tokens"] == 2 * (ids.shape[1] - 1)
    assert math.isclose(result["accuracy"], (guess == ids[0, 1:]).float().mean().item(), rel_tol=1e-6)
    assert math.isclose(result["confidence"], confidence.mean().item(), rel_tol=1e-5)


def test_repetition_and_distinct_count_ngrams():
    assert distinct_n([["a", "b", "a", "b"]], 2) == 2 / 3
    assert distinct_n([[1, 2], [1, 2]], 1) == 0.5
    assert math.isnan(distinct_n([["a"]], 2))
    assert repetition([["a", "b", "c", "d", "e"]]) == 0
    assert repetition([["a"] * 8, ["b", "c", "d", "e"]]) == (1 - 1 / 5 + 0) / 2


@given(st.lists(st.text("ab", max_size=12), min_size=1, max_size=3), st.text("ab", max_size=30))
def test_longest_overlap_is_what_brute_force_finds(samples, text):
    expected = max(
        end - start
        for sample in samples
        for start in range(len(sample) + 1)
        for end in range(start, len(sample) + 1)
        if sample[start:end] in text
    )
    found = longest_overlap(samples, text)
    assert len(found) == expected and found in text and any(found in sample for sample in samples)


def test_a_copied_passage_is_found_in_ten_megabytes(moby_dick):
    passage = moby_dick[600_000:600_211]
    text = moby_dick * 9
    assert longest_overlap([f"\N{WHALE}{passage}\N{WHALE}", "nothing of it"], text) == passage


def test_sample_quality_tells_copies_from_own_words():
    result = sample_quality(["the whale swims", "he said: Call me Ishmael."], "Call me Ishmael. Some years ago")
    assert result["overlap"] == "Call me Ishmael." and result["overlap_characters"] == 16
    assert result["distinct_1"] == 1 and result["repetition"] == pytest.approx(0)
