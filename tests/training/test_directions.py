"""Held-out metrics: which way each improves, which may choose the best checkpoint, any set in any form."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from hf_lm import HfLmForCausalLM
from hf_lm.app.run import train
from hf_lm.data.collator import PackedCollator
from hf_lm.errors import InputError
from hf_lm.tasks import TASKS, task_class
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.training.arguments import HfLmTrainingArguments
from hf_lm.training.metrics import greater_is_better, is_known
from hf_lm.training.trainer import HfLmTrainer

SHORT = {"report_to": "none", "sample_prompts": None, "max_steps": 2, "eval_steps": 2, "save_strategy": "no", "block_size": 64}  # fmt: skip


class Own(TrainingArguments):
    """Arguments that a user has written."""


def task_files(folder: Path) -> dict[str, dict]:
    """Keys of a small recipe of each task."""
    texts = [f"The whale number {number} is {'white' if number % 2 else 'grey'}." for number in range(40)]
    labelled = [{"text": text, "label": text.split()[-1][:-1]} for text in texts]
    rows = {
        "causal-lm": [{"text": text} for text in texts],
        "sequence-classification": labelled,
        "label-likelihood": labelled,
        "chat": [{"prompt": text, "completion": text[::-1]} for text in texts],
        "translation": [{"en": text, "de": text.lower()} for text in texts],
    }
    keys = {}
    for task, lines in rows.items():
        file = folder / f"{task}.jsonl"
        file.write_text("\n".join(map(json.dumps, lines)))
        keys[task] = {"task": task, "train_file": str(file), "validation_split_percentage": 20}
    keys["label-likelihood"]["prompt_template"] = "{text} It is {label}"
    keys["translation"]["language_pairs"] = ["en-de"]
    return keys


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task != "causal-lm"] + ["causal-lm"]
)
def test_every_reported_metric_has_a_direction(recipe, tmp_path, task):
    path = recipe(**SHORT, **task_files(tmp_path)[task])
    metrics = train(*parse_recipe(path, []))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    (evaluation,) = (entry for entry in history if "eval_runtime" in entry)
    reported = {name.removeprefix("eval_") for name in evaluation if name.startswith("eval_")}
    assert {name for name in reported if not is_known(name)} == set()
    timing = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
    assert reported - timing == set(task_class(task).reported)
    scores = {key.removeprefix("eval_") for key in metrics if f"{key}_interval" in metrics or key.startswith("eval_")}
    assert scores and {name for name in {*scores, *metrics["quality"]} if not is_known(name)} == set()


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_that_a_task_says_it_reports_is_known(task):
    assert [name for name in task_class(task).reported if not is_known(name)] == []


@pytest.mark.parametrize(
    ("name", "better"),
    [("loss", False), ("eval_bits_per_byte", False), ("eval_news_perplexity", False), ("bits_per_byte_low", False),
     ("ece", False), ("accuracy", True), ("eval_macro_f1", True), ("chrf/en-de", True), ("tokens", None), ("fluency", None)],
)  # fmt: skip
def test_directions(name, better):
    assert greater_is_better(name) is better


def test_what_is_not_known_is_asked_for_and_what_is_wrong_is_refused(tmp_path):
    def build(**keys) -> HfLmTrainingArguments:
        return HfLmTrainingArguments(output_dir=str(tmp_path), report_to="none", **keys)

    for name in ("perplexity", "eval_perplexity"):
        assert build(metric_for_best_model=name).greater_is_better is False
    assert build(metric_for_best_model="fluency", greater_is_better=True).greater_is_better is True
    for name in ("fluency", "tokens"):
        with pytest.raises(InputError, match=f"greater {name} is better; add greater_is_better: true or false"):
            build(metric_for_best_model=name)
    with pytest.raises(InputError, match="greater_is_better: bits_per_byte is better when less"):
        build(metric_for_best_model="bits_per_byte", greater_is_better=True)


@pytest.mark.parametrize("task", TASKS)
def test_a_metric_that_a_task_does_not_report_is_refused_before_anything_is_read(recipe, task):
    keys = {"task": task, "train_file": "nowhere.jsonl", "metric_for_best_model": "f1"}
    with pytest.raises(InputError, match="metric_for_best_model: f1 is not reported; possible are loss, "):
        train(*parse_recipe(recipe(**keys), []))


@pytest.fixture
def rows():
    """`rows(count, seed)`: rows of tokens with the bytes of each."""

    def make(count: int, seed: int = 0) -> Dataset:
        numbers = torch.Generator().manual_seed(seed)
        ids = [torch.randint(10, 97, (4 + row % 9,), generator=numbers).tolist() for row in range(count)]
        positions = [list(range(len(row))) for row in ids]
        sizes = [3 * len(row) + seed for row in ids]
        return Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": positions, "num_bytes": sizes})

    return make


@pytest.fixture
def build(tiny_config, tmp_path):
    """`build(eval_dataset, **arguments)`: a trainer with the same weights each time."""

    def make(held_out, kind=HfLmTrainingArguments, train_dataset=None, **arguments) -> HfLmTrainer:
        torch.manual_seed(0)
        options = {"output_dir": str(tmp_path / "run"), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "bf16": False}  # fmt: skip
        return HfLmTrainer(
            model=HfLmForCausalLM(tiny_config),
            args=kind(**{**options, **arguments}),
            eval_dataset=held_out,
            train_dataset=train_dataset,
            data_collator=PackedCollator(2),
        )

    return make


def bits(metrics: dict) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.endswith("bits_per_byte")}


def test_bytes_belong_to_their_rows(build, rows):
    one, two = rows(17), rows(30, seed=1)
    of_one, of_two = (bits(build(held_out).evaluate())["eval_bits_per_byte"] for held_out in (one, two))
    trainer = build(one)
    assert of_one != of_two and trainer.eval_dataset is one
    for _ in range(2):
        assert bits(trainer.evaluate(two)) == {"eval_bits_per_byte": of_two}
        assert bits(trainer.evaluate()) == {"eval_bits_per_byte": of_one}
    prediction = trainer.predict(two)
    assert bits(prediction.metrics) == {"test_bits_per_byte": of_two}
    assert prediction.label_ids[:, 1].tolist() == two["num_bytes"]
    both = {"eval_a_bits_per_byte": of_one, "eval_b_bits_per_byte": of_two}
    assert bits(trainer.evaluate({"a": one, "b": two})) == both
    assert bits(build({"a": one, "b": two}).evaluate()) == both
    stream = two.to_iterable_dataset()
    assert bits(trainer.evaluate(stream)) == pytest.approx({"eval_bits_per_byte": of_two})
    assert bits(trainer.evaluate(list(two))) == {"eval_bits_per_byte": of_two}
    without = trainer.evaluate(two.remove_columns("num_bytes"))
    assert "eval_bits_per_byte" not in without and without["eval_perplexity"] > 1
    given = build(two.remove_columns("num_bytes"))
    assert "eval_bits_per_byte" not in given.evaluate()


@pytest.mark.parametrize(
    "arguments",
    [{"batch_eval_metrics": True}, {"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1},
     {"prediction_loss_only": True}, {"include_for_metrics": ["inputs", "loss"]}, {"remove_unused_columns": False},
     {"eval_use_gather_object": True}, {"per_device_eval_batch_size": 3, "dataloader_drop_last": True}],
    ids=lambda arguments: next(iter(arguments)),
)  # fmt: skip
def test_options_of_evaluation_change_no_number(build, rows, arguments):
    one, two = rows(17), rows(30, seed=1)
    plain, trainer = build(one), build(one, **arguments)
    for held_out in (None, two):
        expected, got = plain.evaluate(held_out), trainer.evaluate(held_out)
        for name in ("loss", "perplexity", "tokens", "bits_per_byte"):
            assert got[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-6)
    assert bits(trainer.predict(two).metrics)["test_bits_per_byte"] == pytest.approx(
        bits(expected)["eval_bits_per_byte"]
    )


def test_workers_that_stay_read_the_set_that_is_asked_for(build, rows):
    one, two = rows(6), rows(9, seed=1)
    trainer = build(one, dataloader_num_workers=1, dataloader_persistent_workers=True)
    found = [trainer.evaluate(held_out)["eval_tokens"] for held_out in (None, two, None)]
    assert found == [sum(len(row) - 1 for row in held_out["input_ids"]) for held_out in (one, two, one)]


@pytest.mark.parametrize(
    ("metric", "kind"), [("bits_per_byte", HfLmTrainingArguments), ("eval_perplexity", TrainingArguments)]
)
def test_the_best_checkpoint_is_the_one_with_the_lowest(build, rows, tmp_path, metric, kind):
    """Training at too high a rate: the first evaluation is the best."""
    arguments = {
        "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1, "seed": 1,
        "load_best_model_at_end": True, "metric_for_best_model": metric, "learning_rate": 0.3, "warmup_steps": 0,
    }  # fmt: skip
    trainer = build(rows(8, seed=2), kind, rows(16), **arguments)
    trainer.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    scores = {row["step"]: row[name] for row in trainer.state.log_history if name in row}
    best = min(scores, key=scores.get)
    assert len(scores) == 4 and best < 4 and trainer.args.greater_is_better is False
    assert trainer.state.best_global_step == best and trainer.state.best_metric == scores[best]
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "run" / f"checkpoint-{best}"
    assert trainer.evaluate()[name] == pytest.approx(scores[best], rel=1e-6)


def test_a_trainer_without_the_metric_is_refused_before_it_trains(build, rows):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "save_strategy": "no"}
    trainer = build({"a": rows(4)}, train_dataset=rows(4), metric_for_best_model="bits_per_byte", **arguments)
    with pytest.raises(InputError, match="bits_per_byte is not reported; possible are a_loss, a_perplexity, a_bits"):
        trainer.train()
    trainer = build(rows(4).remove_columns("num_bytes"), train_dataset=rows(4), metric_for_best_model="bits_per_byte", **arguments)  # fmt: skip
    with pytest.raises(InputError, match="bits_per_byte is not reported; possible are loss, perplexity"):
        trainer.train()
    trainer = build(rows(4), train_dataset=rows(4), metric_for_best_model="accuracy", **arguments)
    trainer.models_language, trainer.compute_metrics = False, lambda rows: {"kept": 1.0}
    with pytest.raises(InputError, match="metric_for_best_model: .*'eval_accuracy'.* not found.*eval_kept"):
        trainer.train()


def test_plain_arguments_have_every_feature_at_its_default(build, rows, tmp_path):
    arguments = {"max_steps": 3, "save_steps": 2, "learning_rate": 0.01}
    straight = build(None, Own, rows(16), **arguments)
    straight.train()
    assert straight.args.on_divergence == "stop"
    (tmp_path / "run" / "checkpoint-3").rename(tmp_path / "away")
    resumed = build(None, Own, rows(16), **arguments)
    resumed.train(resume_from_checkpoint=True)
    expected = straight.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())
    with pytest.raises(InputError, match="learning_rate 0.01 -> 0.1"):
        build(None, Own, rows(16), **{**arguments, "learning_rate": 0.1}).train(resume_from_checkpoint=True)
