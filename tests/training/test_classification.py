"""Labels for texts, by a head and by likelihood: scores, checkpoints, what is refused."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline
from transformers.trainer_callback import TrainerState

from hf_lm import HfLmForCausalLM, HfLmForSequenceClassification
from hf_lm.app.run import train
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.tasks import task_class
from hf_lm.tasks.classification import names_of
from hf_lm.tasks.recipe import parse_recipe

TASKS = ("sequence-classification", "label-likelihood")


def run(path: str, *overrides: str) -> dict:
    return train(*parse_recipe(path, list(overrides)))


def build(path: str, *overrides: str):
    """What the task has made of its data, and its trainer, before training."""
    model, data, training = parse_recipe(path, list(overrides))
    task = task_class(data.task)(model, data, training)
    prepared = task.prepare()
    return prepared, task.build_trainer(prepared)


@pytest.fixture
def rows(repository) -> pandas.DataFrame:
    """An easy question about real sentences: in which language are they?"""
    data = {"English": "sentiment/data/movie_sentiment.parquet", "Chinese": "chinese/data/chinese_lyrics.parquet"}
    tables = []
    for label, path in data.items():
        texts = pandas.read_parquet(repository / "recipes" / path)["text"][:240].str.replace("\n", "").str[:150]
        splits = ["train"] * 200 + ["validation"] * 20 + ["test"] * 20
        tables.append(pandas.DataFrame({"text": texts, "label": label, "split": splits}))
    return pandas.concat(tables, ignore_index=True)


@pytest.fixture
def task_recipe(recipe, tmp_path, rows):
    """`task_recipe(rows=..., key=value, ...)`: a small recipe over these rows."""

    def write(rows=rows, **changes) -> str:
        rows.to_parquet(tmp_path / "rows.parquet")
        keys = {
            "task": "sequence-classification",
            "train_file": str(tmp_path / "rows.parquet"),
            "split_column_name": "split",
            "prompt_template": "{text} This is {label}",
            "block_size": 96,
            "max_steps": 16,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 16,
            "eval_steps": 8,
            "save_steps": 8,
            "sample_prompts": None,
            "report_to": "none",
        }
        return recipe(**{**keys, **changes})

    return write


@pytest.fixture
def base(task_recipe, tmp_path) -> str:
    """A language model with its tokenizer, untrained, whose output depends on all of its weights."""
    _, trainer = build(task_recipe(task="label-likelihood"))
    trainer.model.config.zero_init_residual = False
    HfLmForCausalLM(trainer.model.config).save_pretrained(tmp_path / "base")
    trainer.processing_class.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_learns_and_scores_the_test_split_beside_a_baseline(task_recipe, tmp_path, task):
    metrics = run(task_recipe(task=task, baseline=True))
    assert metrics["split"] == "test" and metrics["examples"] == 40
    assert metrics["accuracy"] > 0.8
    low, high = metrics["accuracy_interval"]
    assert low <= metrics["accuracy"] <= high
    assert 0 < metrics["macro_f1"] <= 1 and 0 <= metrics["ece"] <= 1
    (baseline,) = metrics["baselines"]
    assert baseline["accuracy"] > 0.8
    assert list(metrics["per_class"]) == metrics["labels"] == ["Chinese", "English"]
    confusion = metrics["confusion_matrix"]
    assert [row["support"] for row in metrics["per_class"].values()] == [sum(row) for row in confusion] == [20, 20]
    assert confusion[0][0] + confusion[1][1] == round(40 * metrics["accuracy"])
    for name in ("precision", "recall", "f1"):
        both = [row[name] for row in metrics["per_class"].values()]
        assert math.isclose(metrics[f"macro_{name}"], sum(both) / 2) and f"macro_{name}" in baseline
    for score in (metrics, baseline):
        assert f"accuracy {score['accuracy']:.3f}" in metrics["summary"]
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"| accuracy | {metrics['accuracy']:.4g} | " in card
    assert f"| accuracy: TF-IDF + logistic regression | {baseline['accuracy']:.4g} | " in card
    english = metrics["per_class"]["English"]
    scores = " | ".join(f"{english[name]:.4g}" for name in ("precision", "recall", "f1"))
    assert "|---|---|---|---|---|\n| Chinese | " in card and f"\n| English | {scores} | 20 |\n" in card
    assert f"\n| | Chinese | English |\n|---|---|---|\n| Chinese | {confusion[0][0]} | {confusion[0][1]} |\n" in card
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    tables = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["tables"]
    rows = {table["title"]: table["rows"] for table in tables}
    assert rows["Classes"][1] == ["English", *scores.split(" | "), "20"]
    assert rows["Confusion matrix"] == [
        [name, *map(str, row)] for name, row in zip(metrics["labels"], confusion, strict=True)
    ]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_accuracy" in entry] == [8, 16]


def test_the_pipeline_gives_the_labels_that_were_scored(task_recipe, tmp_path, rows):
    metrics = run(task_recipe())
    classify = pipeline("text-classification", model=str(tmp_path / "run"))
    assert type(classify.model) is HfLmForSequenceClassification
    test = rows[rows["split"] == "test"]
    found = [row["label"] for row in classify(test["text"].tolist(), batch_size=8, truncation=True)]
    assert (test["label"].to_numpy() == found).mean() == metrics["accuracy"]
    (long,) = classify("whale " * 500, truncation=True)
    assert classify.tokenizer.model_max_length == 96 and long["label"] == "English"
    assert classify.model.config.label2id == {"Chinese": 0, "English": 1}


@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=pytest.mark.slow)])
def test_the_folder_can_be_shared(task_recipe, tmp_path, task, capsys):
    run(task_recipe(task=task, license="mit", language="en", data_license="mit", max_steps=2))
    assert main(["push", str(tmp_path / "run"), "somebody/labels", "--dry-run"]) == 0
    assert main(["doctor", str(tmp_path / "run")]) == 0, capsys.readouterr()


@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_of_ours_or_of_another_family_becomes_our_class_in_float32(task_recipe, base, tmp_path, task):
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "llama")
    for folder in (base, str(tmp_path / "llama")):
        path = task_recipe(task=task, model_name_or_path=folder, config_overrides=None, muon_learning_rate=None)
        _, trainer = build(path)
        assert type(trainer.model).__name__.startswith("HfLmFor")
        assert trainer.model.dtype == torch.float32
        loaded = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
        assert torch.equal(trainer.model.get_input_embeddings().weight, loaded.float())


def test_a_labels_likelihood_is_that_of_its_words_alone(task_recipe, base, rows):
    words = ["Chinese, of course", "English"]  # of different length
    data, trainer = build(
        task_recipe(task="label-likelihood", model_name_or_path=base, config_overrides=None, muon_learning_rate=None),
        *("--label_words", *words),
    )
    found = trainer.predict(data.encoded["test"]).predictions.reshape(-1, 2)
    test = rows[rows["split"] == "test"].reset_index()
    order = {text: number for number, text in enumerate(sorted(test["text"], key=len))}
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    for text in test["text"][:3]:
        if len([other for other in order if len(other) == len(text)]) > 1:
            continue
        for number, word in enumerate(words):
            prompt, answer = (
                tokenizer(f"{text} This is")["input_ids"],
                tokenizer(f"{text} This is {word}")["input_ids"],
            )
            assert answer[: len(prompt)] == prompt
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([answer])).logits[0].log_softmax(-1)
            expected = -sum(scores[place - 1, answer[place]].item() for place in range(len(prompt), len(answer)))
            assert math.isclose(found[order[text], number], expected, rel_tol=1e-4)


@pytest.mark.slow
def test_the_zero_shot_score_stands_beside_the_trained_one(task_recipe, base):
    metrics = run(
        task_recipe(task="label-likelihood", model_name_or_path=base, config_overrides=None, learning_rate=0.01)
    )
    (before,) = metrics["baselines"]
    assert before["name"] == "before training"
    assert before["accuracy"] < metrics["accuracy"]


def test_only_the_labels_words_are_learned_and_packing_changes_neither_them_nor_the_order_of_scores(
    task_recipe, capsys
):
    totals = []
    for packing in ("true", "false"):
        data, trainer = build(task_recipe(task="label-likelihood"), "--packing", packing)
        tokenizer, learned = trainer.processing_class, []
        for row in trainer.train_dataset:
            learned.append(tokenizer.decode(row["labels"][row["labels"] != -100]))
        totals.append(sorted(re.findall(r" Chinese| English", "".join(learned))))
        assert set("".join(learned)) <= set(" ChineseEnglish")
        assert len(data.encoded["test"]) == 80  # each text with each label, whatever the packing
    assert totals[0] == totals[1]
    assert len(totals[0]) == 400


def test_long_texts_lose_their_end_and_never_the_label_and_are_counted(task_recipe, rows, caplog):
    for task in TASKS:
        caplog.clear()
        made, trainer = build(task_recipe(task=task, block_size=24))
        tokenizer = trainer.processing_class
        assert max(len(row["input_ids"]) for row in trainer.train_dataset) <= 24
        assert re.search(r"train: \d+ of 400 examples have more than block_size 24 tokens and are cut", caplog.text)
        if task == "label-likelihood":
            for row in made.encoded["test"]:
                assert re.search(r" This is (Chinese|English)$", tokenizer.decode(row["input_ids"]))
    caplog.clear()
    _, trainer = build(task_recipe(block_size=24), "--long_examples", "drop")
    dropped = int(re.search(r"train: (\d+) of 400 examples .* are left out", caplog.text)[1])
    assert len(trainer.train_dataset) == 400 - dropped > 0
    assert re.search(r"test: \d+ of 40 examples .* are cut", caplog.text)  # what is scored is scored whole


def test_oversampling_makes_labels_equally_frequent_in_training_only(task_recipe, rows, caplog):
    few = rows.drop(rows[(rows["label"] == "Chinese") & (rows["split"] == "train")].index[30:])
    for task in TASKS:
        made, trainer = build(task_recipe(rows=few, task=task, class_balance="oversample", packing=False))
        assert len(trainer.train_dataset) == 400
        assert "230 examples become 400" in caplog.text
        assert len(made.rows["test"]) == 40
    assert sum(build(task_recipe(rows=few))[1].train_dataset["labels"]) == 200


@pytest.mark.parametrize("labels", [None, ["story", "fact"]])
def test_numbers_are_named_in_their_order(task_recipe, rows, labels):
    data, _ = build(task_recipe(rows=rows.assign(label=(rows["label"] == "English").astype(int)), class_names=labels))
    assert names_of(data.rows["train"]) == (labels or ["0", "1"])
    kept = {row["text"]: row["label"] for row in data.rows["train"]}
    assert all(
        kept[text] == (label == "English")
        for text, label in zip(rows["text"], rows["label"], strict=True)
        if text in kept
    )


@pytest.mark.slow
def test_early_stopping_ends_with_the_best_checkpoint_and_stays_finished(task_recipe, tmp_path, capsys):
    changes = {"learning_rate": 0.0, "muon_learning_rate": None, "eval_steps": 3, "save_steps": 3}
    path = task_recipe(**changes, metric_for_best_model="accuracy", early_stopping_patience=2)
    metrics = run(path)
    assert metrics["steps"] == 9  # the first is the best; two more are no better
    state = TrainerState.load_from_json(str(tmp_path / "run" / "trainer_state.json"))
    assert Path(state.best_model_checkpoint).name == "checkpoint-3"
    again = run(path, "--resume")
    assert again["steps"] == 9 and again["accuracy"] == metrics["accuracy"]
    assert "has finished training" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoint-9").rename(tmp_path / "away")
    assert run(path, "--resume")["steps"] == 9  # the count goes on from the checkpoint


@pytest.mark.slow
def test_resumed_run_ends_with_the_same_score(task_recipe, tmp_path):
    straight = run(task_recipe(task="label-likelihood"))
    (tmp_path / "run" / "checkpoint-16").rename(tmp_path / "away")
    resumed = run(task_recipe(task="label-likelihood"), "--resume")
    for key in ("accuracy", "ece", "train_loss"):
        assert resumed[key] == straight[key]


BAD = {
    "no text column": ({"text_column_name": "review"}, r"text_column_name: .* no column review; it has text, label"),
    "no label column": ({"label_column_name": "stars"}, r"label_column_name: .* no column stars; it has text, label"),
    "undeclared label": (
        {"class_names": ["Chinese", "Latin"]},
        r"class_names: train has the label 'English' .*not among 'Chinese', 'Latin'",
    ),
    "one class": ({"class_names": ["Latin"]}, "class_names: two or more"),
    "no template text": (
        {"task": "label-likelihood", "prompt_template": "It is {label}"},
        r"prompt_template: .*\{text\}",
    ),
    "words": ({"task": "label-likelihood", "label_words": ["a"]}, "label_words: one for each of Chinese, English"),
    "no room": ({"task": "label-likelihood", "block_size": 2}, "block_size: 2 leaves no room"),
    "too long": ({"block_size": 24, "long_examples": "error"}, r"long_examples: train: \d+ of 400"),
    "all dropped": ({"block_size": 3, "long_examples": "drop"}, "long_examples: train: 400 of 400"),
    "unknown balance": ({"class_balance": "yes"}, "class_balance: must be none or oversample, got 'yes'"),
    "unknown task": ({"task": "label-likelyhood"}, "task: .*did you mean 'label-likelihood'"),
    "no evaluation": (
        {"split_column_name": None, "validation_split_percentage": 0, "early_stopping_patience": 1},
        "early_stopping_patience: needs held-out data and an eval_strategy",
    ),
    "patience": ({"early_stopping_patience": 0}, "early_stopping_patience: must be at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(task_recipe, tmp_path, capsys, case):
    changes, message = BAD[case]
    assert main(["train", task_recipe(**changes)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1]), lines
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.assign(text=""), "every row of column text is empty"),
        (lambda rows: rows.assign(label=[None, *rows["label"][1:]]), "class_names: train has a text without a label"),
        (lambda rows: rows.assign(label=0.5), "column label holds 0.5; a label is text or a whole number"),
        (lambda rows: rows.assign(label=[["Latin"]] * len(rows)), r"column label holds \['Latin'\]"),
        (lambda rows: rows.assign(text=" \n"), "train: holds 0 examples; at least two are needed"),
        (lambda rows: rows.assign(label="Latin"), "class_names: two or more different labels are needed, got Latin"),
    ],
)
def test_bad_rows_are_named(task_recipe, rows, change, message):
    with pytest.raises(InputError, match=message):
        build(task_recipe(rows=change(rows)))


@pytest.mark.slow
def test_examples_are_shown_with_their_label(task_recipe, capsys):
    for task, shown in zip(TASKS, (r" -> (Chinese|English)$", r"⟦.* This is⟧ (Chinese|English)$"), strict=True):
        run(task_recipe(task=task, max_steps=1, eval_strategy="no"), "--show-examples", "1", "--overwrite")
        assert re.search(shown, capsys.readouterr().out, re.MULTILINE | re.DOTALL)


def test_empty_texts_are_left_out_and_counted(task_recipe, rows, caplog):
    rows.loc[:4, "text"] = ["", "", "", "", " \n"]
    data, _ = build(task_recipe(rows=rows))
    assert len(data.rows["train"]) == 395
    assert "4 of 400 rows of column text are empty and left out" in caplog.text
    assert "train: 1 texts are nothing but white space and left out" in caplog.text


@pytest.mark.slow  # needs peft, which the long tests install
@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_and_its_head_are_saved_and_merged(task_recipe, base, tmp_path, rows, task, monkeypatch, capsys):
    keys = {"model_name_or_path": base, "use_peft": True, "config_overrides": None, "muon_learning_rate": None}
    metrics = run(task_recipe(task=task, **keys, max_steps=60, learning_rate=0.02))
    assert metrics["accuracy"] > 0.8
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    tag = "text-classification" if task == "sequence-classification" else "text-generation"
    assert f"\npipeline_tag: {tag}\n" in text
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    if task == "sequence-classification":
        assert capsys.readouterr().out.splitlines()[-1] in ("Chinese", "English")
        classify = pipeline("text-classification", model=str(tmp_path / "merged"))
        test = rows[rows["split"] == "test"]
        found = [row["label"] for row in classify(test["text"].tolist(), batch_size=8, truncation=True)]
        assert (test["label"].to_numpy() == found).mean() == metrics["accuracy"]
    else:
        again = task_recipe(task=task, **keys | {"model_name_or_path": str(tmp_path / "merged"), "use_peft": False})
        (before,) = run(again, "--max_steps", "1", "--output_dir", str(tmp_path / "again"))["baselines"]
        assert before["accuracy"] == metrics["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "label_likelihood"])
def test_recipe_runs_shortly(repository, base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(repository)
    overrides = {"output_dir": tmp_path / "short", "model_name_or_path": base, "max_steps": 6, "max_eval_samples": 50,
                 "eval_steps": 3, "save_steps": 3, "report_to": "none"}  # fmt: skip
    words = [str(word) for key, value in overrides.items() for word in (f"--{key}", value)]
    assert main(["train", f"recipes/sentiment/{name}.yaml", *words]) == 0
    metrics = json.loads((tmp_path / "short" / "metrics.json").read_text())
    assert metrics["examples"] == 50 and metrics["baselines"][-1]["accuracy"] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_score_every_row_once_and_in_order(task_recipe, rows, tmp_path, task):
    odd = rows.drop(rows[rows["split"] == "test"].index[:7])  # no whole number of batches for two processes
    path = task_recipe(rows=odd, task=task, per_device_train_batch_size=8, per_device_eval_batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hf_lm", "train", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["processes"], metrics["examples"]) == (2, 33)
    assert metrics["accuracy"] > 0.9
