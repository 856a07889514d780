"""Minimal pairs: what the rules change, how models and the trigram baseline are judged."""

import math

import pytest

from hf_lm.errors import InputError
from hf_lm.evaluation.probe import RULES, WordTrigrams, minimal_pairs, probe, sentences, solved
from hf_lm.evaluation.sentences import score_sentences


@pytest.mark.parametrize(
    ("rule", "real", "changed"),
    [
        ("agreement", "And then he was gone again.", "And then he were gone again."),
        ("agreement", "There they have a ship.", "There they has a ship."),
        ("word_order", "He went down to the ship.", "He went down to ship the."),
        ("negation", "Yet he did not see it.", "Yet he not did see it."),
        ("pronoun_case", "It was given to him then.", "It was given to he then."),
        ("article", "It was an island there.", "It was a island there."),
        ("article", "It was a ship there.", "It was an ship there."),
    ],
)
def test_rules_change_one_place_only(rule, real, changed):
    assert minimal_pairs(real)[rule] == [(real, changed)]


def test_sentences_come_from_the_text_and_pairs_spread_over_it(moby_dick):
    text = moby_dick[-100_000:]
    whole = " ".join(text.split())
    found = sentences(text)
    assert len(found) > 300 and all(sentence in whole for sentence in found)
    pairs = minimal_pairs(text, 20)
    assert set(pairs) == set(RULES)
    for examples in pairs.values():
        assert 0 < len(examples) <= 20
        assert len({real for real, _ in examples}) == len(examples)
        assert all(real in whole and real != changed for real, changed in examples)
    places = [whole.index(real) for real, _ in pairs["word_order"]]
    assert places == sorted(places) and places[-1] - places[0] > len(whole) / 2


def test_trigram_probabilities_add_up_to_one():
    baseline = WordTrigrams("Call me Ishmael now. The whale was white. The whale was there.")
    vocabulary = list(baseline.counts[()])
    for context in [("<s>", "<s>"), ("The", "whale"), ("whale", "was"), ("never", "seen"), ("never", "whale")]:
        known = math.fsum(baseline._probability(context, word) for word in vocabulary)
        assert math.isclose(known + baseline._probability(context, "<unknown>"), 1)


def test_counting_solves_most_but_not_all_pairs(moby_dick):
    boundary = len(moby_dick) * 9 // 10
    baseline = WordTrigrams(moby_dick[:boundary])
    pairs = [pair for examples in minimal_pairs(moby_dick[boundary:]).values() for pair in examples]
    right = [baseline.log_probability(real) > baseline.log_probability(changed) for real, changed in pairs]
    assert solved(right)["low"] > 0.85 and solved(right)["high"] < 0.97


def test_wilson_interval_is_the_textbooks():
    result = solved([True] * 81 + [False] * 182)  # 0.308, 0.2552 to 0.3662 (Newcombe 1998, table I)
    assert (round(result["low"], 4), round(result["high"], 4)) == (0.2553, 0.3662)


def test_a_pair_is_solved_where_the_real_sentence_is_likelier(model, tokenizer, moby_dick):
    result = probe(model, tokenizer, moby_dick[:30_000], moby_dick[-60_000:], per_rule=10)
    asked = minimal_pairs(moby_dick[:30_000], 10)
    for rule, row in result.items():
        if rule == "all":
            continue
        right = [
            score_sentences(model, tokenizer, [real])[0].log_probability
            > score_sentences(model, tokenizer, [changed])[0].log_probability
            for real, changed in asked[rule]
            if max(len(tokenizer(one)["input_ids"]) for one in (real, changed)) < 64
        ]
        assert row["pairs"] == len(right) and row["model"]["accuracy"] == sum(right) / len(right)
        assert len(row["failed"]) == len(right) - sum(right)
    assert result["all"]["pairs"] == sum(row["pairs"] for rule, row in result.items() if rule != "all")
    with pytest.raises(InputError, match="no sentence"):
        probe(model, tokenizer, "Nothing here")
