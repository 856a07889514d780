"""A whole run: what the folder holds, what resumes, what is refused."""

import json
import logging
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_lm.app.run import train
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.tasks.recipe import parse_recipe


def run(path: str, *overrides: str) -> dict:
    return train(*parse_recipe(path, list(overrides)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_everything_in_one_folder(small_run):
    folder, metrics = small_run
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "metrics.json",
        "loss_curve.png", "README.md", "recipe.yaml", "samples.jsonl", "modeling_hf_lm.py", "runs",
    } <= names  # fmt: skip
    assert "training_args.bin" not in names  # a pickle
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    for key in ("bits_per_byte", "perplexity", "train_tokens", "train_seconds", "peak_memory_bytes", "seed"):
        assert metrics[key] > 0
    assert len(metrics["data"]["sha256"]) == 64
    assert torch.__version__.split("+")[0] == metrics["versions"]["torch"].split("+")[0]  # the build has two spellings

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer("Call me Ishmael.", return_tensors="pt").input_ids.max() < model.config.vocab_size
    text = pipeline("text-generation", model=str(folder))("Call me", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("Call me")
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [6, 12]


@pytest.mark.slow
def test_a_compiled_run_has_one_graph_and_the_same_losses(recipe, tmp_path):
    """Of its forecast too, and for an epoch's smaller last batch: with a second size all would run in a graph for any."""
    changes = {"per_device_train_batch_size": 48, "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
    losses, graphs = [], torch._dynamo.utils.counters["stats"]
    for backend in (None, "aot_eager"):  # naming one compiles
        folder = tmp_path / str(backend)
        before = graphs["unique_graphs"]
        run(recipe(**changes, output_dir=str(folder), torch_compile_backend=backend, forecast=True))
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
        assert history[-1]["epoch"] > 1
        assert graphs["unique_graphs"] - before == (backend is not None)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_kept_recipe_runs_the_same(recipe, tmp_path, capsys):
    of_other_data = {"language": "en", "data_license": "mit", "data_sha256": "0" * 64}
    first = run(recipe(max_steps=2, output_dir=str(tmp_path / "first"), **of_other_data), "--seed", "7")
    assert first["language"] is first["data"]["license"] is None
    assert "data_sha256: 00000000... is not that of the data" in capsys.readouterr().err
    run(str(tmp_path / "first" / "recipe.yaml"), "--output_dir", str(tmp_path / "second"))
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    assert json.loads((tmp_path / "second" / "metrics.json").read_text())["seed"] == 7


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_of_ours_or_of_another_family(recipe, tmp_path):
    first = run(recipe(max_steps=40, output_dir=str(tmp_path / "first")))
    second = run(recipe(max_steps=40, model_name_or_path=str(tmp_path / "first"), config_overrides=None))
    assert second["eval_loss"] < first["eval_loss"]
    assert second["base_model"] == {"id": str(tmp_path / "first")}

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "llama")
    metrics = run(recipe(model_name_or_path=str(tmp_path / "llama"), config_overrides=None), "--overwrite")
    assert metrics["steps"] == 12


def test_loss_falls_on_real_text_below_the_letters_entropy(recipe, tmp_path):
    metrics = run(recipe(max_steps=60, eval_strategy="no", save_strategy="no"))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < losses[0] - 1
    assert metrics["bits_per_byte"] < 4.0  # the entropy of single letters of this book is 4.2 bits


@pytest.mark.slow
def test_held_out_numbers_do_not_depend_on_the_batch_size(recipe):
    first = run(recipe(data_license="mit", language="en"))
    stated = {"data_license": "mit", "language": "en", "data_sha256": first["data"]["sha256"]}
    second = run(recipe(per_device_eval_batch_size=3, dataloader_drop_last=True, **stated), "--overwrite")
    for key in ("eval_loss", "bits_per_byte"):
        assert math.isclose(first[key], second[key], rel_tol=1e-6)
    assert first["eval_tokens"] == second["eval_tokens"]
    for metrics in (first, second):
        assert (metrics["language"], metrics["data"]["license"]) == ("en", "mit")


def test_evaluation_in_bfloat16_rounds_no_weight_that_is_saved(recipe, tmp_path):
    run(recipe(max_steps=1, eval_strategy="no", sample_prompts=None, bf16_full_eval=True))
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
    assert any((value != value.bfloat16().float()).any() for value in weights(tmp_path / "run").values())


@pytest.mark.slow
def test_a_stream_trains_like_the_same_rows_on_disk(recipe, tmp_path, moby_dick):
    lines = [moby_dick[start : start + 500] for start in range(0, 60_000, 500)]
    for name, part in (("train", lines[:100]), ("held_out", lines[100:])):
        rows = "\n".join(json.dumps({"text": text}) for text in part)
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    files = {"train_file": str(tmp_path / "train.jsonl"), "validation_file": str(tmp_path / "held_out.jsonl")}
    changes = {**files, "train_sampling_strategy": "sequential", "max_steps": 6}
    on_disk = run(recipe(**changes, output_dir=str(tmp_path / "disk")))
    streamed = run(recipe(**changes, streaming=True))
    assert same(weights(tmp_path / "disk"), weights(tmp_path / "run"))
    assert streamed["bits_per_byte"] == on_disk["bits_per_byte"]


def test_a_stream_of_empty_rows_is_refused(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    path = recipe(train_file=str(tmp_path / "rows.jsonl"), streaming=True, validation_split_percentage=0, tokenizer_kind="byte", eval_strategy="no")  # fmt: skip
    with pytest.raises(InputError, match="the training data holds no text"):
        run(path)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_best_checkpoint_can_be_what_is_kept(recipe, tmp_path):
    metrics = run(recipe(save_steps=6, load_best_model_at_end=True, save_total_limit=1))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == tmp_path / "run" and best.is_dir()
    assert same(weights(best), weights(tmp_path / "run"))
    assert math.isclose(metrics["eval_loss"], state["best_metric"], rel_tol=1e-6)


@pytest.mark.parametrize("changes", [
    {"config_overrides": {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "residual_dropout": 0.1}},
    *(pytest.param(changes, marks=pytest.mark.slow) for changes in ({}, {"gradient_accumulation_steps": 2})),
])  # fmt: skip
def test_resumed_run_ends_with_the_same_bits(recipe, tmp_path, changes, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = recipe(**changes)
    run(path)
    straight = weights(tmp_path / "run")
    for name in ("checkpoint-12", "checkpoint-8"):
        (tmp_path / "run" / name).rename(tmp_path / f"away-{name}")
    run(path, "--resume")
    assert same(straight, weights(tmp_path / "run"))
    assert "missing keys" not in caplog.text  # tied weights are saved once


def test_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(finished_run, tmp_path, capsys):
    straight = weights(tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoint-12" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    run(finished_run, "--resume")
    assert "checkpoint-12 is damaged: optimizer.pt has" in capsys.readouterr().err
    assert (tmp_path / "run" / "_damaged-checkpoint-12").is_dir()
    assert same(straight, weights(tmp_path / "run"))


def test_resume_refuses_changed_arguments_and_missing_state(finished_run, tmp_path):
    with pytest.raises(InputError, match=r"learning_rate 0\.003 -> 0\.1"):
        run(finished_run, "--resume", "--learning_rate", "0.1")
    manifest = tmp_path / "run" / "checkpoint-12" / "manifest.json"
    listed = json.loads(manifest.read_text())
    del listed["files"]["scheduler.pt"]
    manifest.write_text(json.dumps(listed))
    (manifest.parent / "scheduler.pt").unlink()
    with pytest.raises(InputError, match="lacks the place in the learning-rate schedule"):
        run(finished_run, "--resume")


def test_resuming_a_finished_run_trains_no_further(finished_run, tmp_path, capsys):
    before = weights(tmp_path / "run")
    metrics = run(finished_run, "--resume")
    assert metrics["steps"] == 12
    assert "has finished training" in capsys.readouterr().err
    assert same(before, weights(tmp_path / "run"))


def test_output_folder_is_protected(recipe, small_run, tmp_path):
    with pytest.raises(InputError, match="no valid checkpoint"):
        run(recipe(), "--resume")
    shutil.copytree(small_run[0], tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run.*--overwrite"):
        run(recipe())
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("years of work")
    for overrides in ((), ("--overwrite",)):
        with pytest.raises(InputError, match="not a training run's"):
            run(recipe(output_dir=str(strange)), *overrides)
    assert (strange / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="output_dir: .*thesis.tex is a file"):
        run(recipe(output_dir=str(strange / "thesis.tex" / "run")))
    with pytest.MonkeyPatch.context() as patch:  # root may write anywhere but on a read-only disk
        patch.setattr("os.access", lambda path, mode: False)
        with pytest.raises(InputError, match=f"output_dir: {tmp_path} is not writable"):
            run(recipe(output_dir=str(tmp_path / "new" / "run")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": "nowhere.txt"}, r"nowhere\.txt"),
        ({"config_overrides": {"hidden_size": 30, "num_attention_heads": 4}}, "hidden_size.*30.*num_attention_heads"),
        ({"config_overrides": {"hidden_size": 0}}, "hidden_size.*0"),
        ({"config_overrides": {"hiden_size": 4}}, "hiden_size"),
        ({"vocab_size": 100}, "vocab.*100"),
        (
            {"streaming": True, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy.*a stream has none",
        ),
        ({"block_size": 100_000}, "100000|100,000"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path: ./nowhere: no such folder"),
        ({"tokenizer_name": "tests/nowhere"}, "tokenizer_name: tests/nowhere: no such folder"),  # tests is a folder
        ({"config_overrides": {"n_layers": 4}}, "n_layers; did you mean 'num_hidden_layers'"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2_and_leaves_nothing(recipe, tmp_path, capsys, changes, message):
    assert main(["train", recipe(**changes)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, error[-1]), error
    assert error[-1].startswith("hf-lm train: ")
    assert not any("Traceback" in line for line in error)
    assert not (tmp_path / "run").exists()


def test_nan_stops_the_run_and_keeps_the_checkpoints(recipe, tmp_path, capsys):
    path = recipe(learning_rate=1e30, muon_learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0)
    assert main(["train", path]) == 1
    assert re.search("the (loss|gradient norm) is (nan|inf)", capsys.readouterr().err)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_goes_on(recipe, tmp_path, number):
    path = recipe(max_steps=100_000, save_steps=50_000, eval_strategy="no")
    process = subprocess.Popen([sys.executable, "-m", "hf_lm", "train", path], stderr=subprocess.PIPE, text=True)
    events = tmp_path / "run" / "recipe.yaml"
    deadline = time.time() + 60
    while not events.exists() and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "--resume continues from there" in errors
    assert "Traceback" not in errors
    assert list((tmp_path / "run").glob("checkpoint-*"))
