import json

import pytest

from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.planning.scaling import (
    DROPOUT,
    LAW,
    Law,
    _Candidates,
    choose,
    in_words,
    matrices,
    regularized,
    seconds_of,
)
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.training.keys import ModelArguments


def test_budgets_are_times():
    assert [seconds_of(text) for text in ("90s", "30min", "2h", "1.5 h")] == [90, 1800, 7200, 5400]
    for wrong in ("30", "min", "-3s", "0s", "2 days"):
        with pytest.raises(InputError, match="--budget"):
            seconds_of(wrong)


def test_the_law_rewards_size_and_data_and_repeated_data_less():
    def of(width=128, batch=1024, read=3e6, text=1e7):
        return LAW.bits_per_byte(matrices(width, 6), 2048, batch, read, text)

    assert of(width=256) < of() and of(read=6e6) < of() < of(batch=8192)
    assert of(read=3e6, text=1e6) > of(read=3e6, text=3e6) == of(read=3e6, text=1e9)
    plateau = [of(read=1e6 * epochs, text=1e6) for epochs in (16, 64, 4096, 16384)]
    assert plateau[0] > plateau[1] > plateau[2] >= plateau[3] > LAW.floor


def test_text_that_is_read_many_times_calls_for_dropout():
    assert regularized({"norm_eps": 1e-5}, 2.0) == {"norm_eps": 1e-5}
    assert regularized({"norm_eps": 1e-5}, 12.0) == {"norm_eps": 1e-5} | DROPOUT
    assert regularized({"residual_dropout": 0.0}, 12.0) == {"residual_dropout": 0.0}  # as the recipe wants it


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_name_or_path": "there"}, "new language model"), ({"tokenizer_kind": "byte"}, "vocabulary")],
)
def test_a_budget_needs_a_new_model(recipe, capsys, changes, message):
    assert main(["plan", recipe(**changes), "--budget", "1min"]) == 2
    assert message in capsys.readouterr().err


def test_the_best_candidate_is_one_that_was_measured_for_longer(monkeypatch):
    quick, longer = {(0, 0, 0): 1.5, (1, 0, 0): 1.6, (2, 0, 0): 1.7}, {(0, 0, 0): 1.8, (1, 0, 0): 1.65}
    candidates = _Candidates(ModelArguments(), None, None, 60.0, LAW)
    monkeypatch.setattr(candidates, "rate", lambda place, seconds: {"bits_per_byte": longer[place]})
    candidates.rated = {place: {"bits_per_byte": value} for place, value in quick.items()}
    candidates.make_sure()
    assert [one["bits_per_byte"] for one in candidates.rated.values()] == [1.8, 1.65, 1.7]


@pytest.mark.slow
def test_a_choice_is_the_best_of_its_candidates_and_trains(recipe, capsys):
    path = recipe(eval_strategy="no")
    small = Law(floor=1.0, size=19.0, alpha=0.3, delta=0.05, data=42.0, beta=0.3, batch_at_start=4000.0, growth=0.0)
    choice = choose(*parse_recipe(path, []), 12.0, small)
    rated = [one["bits_per_byte"] for one in choice["candidates"]]
    assert len(rated) > 3 and rated == sorted(rated)
    assert choice["best"] is choice["candidates"][0]
    assert " ".join(choice["overrides"]) in in_words(choice, [path])
    assert main(["train", path, *choice["overrides"], "--max_steps", "2"]) == 0
    capsys.readouterr()
    assert main(["plan", path, "--budget", "12s", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"].keys() == choice["keys"].keys()


def test_the_command_of_a_budget_holds_the_keys_that_were_asked_with():
    best = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "vocab_size": 1024,
        "per_device_train_batch_size": 8,
        "max_steps": 9,
    }
    best |= {"bits_per_byte": 2.0, "epochs": 1.0, "tokens_per_second": 1.0}
    choice = {"best": best, "candidates": [best], "overrides": ["--max_steps", "9"]}
    command = in_words(choice, ["r.yaml", "--train_file", "a b.txt"]).splitlines()[-1]
    assert command == "hf-lm train r.yaml --train_file 'a b.txt' --max_steps 9"
