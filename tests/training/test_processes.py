"""Several processes, a full disk: what needs a process of its own."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import command, launch
from safetensors.torch import load_file


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_and_evaluate_as_one(recipe, repository, tmp_path, moby_dick, launcher):
    # ragged documents: blocks differ in how many tokens they predict
    rows = [moby_dick[start : start + 40 + start % 300] for start in range(0, 50_000, 400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    changes = {
        "train_file": str(tmp_path / "rows.jsonl"),
        "muon_learning_rate": None,  # its bfloat16 iterations would enlarge differences in the last bit
        "logging_steps": 1,
        "save_strategy": "no",
    }
    path = recipe(**changes)
    single = [sys.executable, "-m", "hf_lm", "train", path, "--output_dir", str(tmp_path / "one")]
    if launcher == "accelerate":
        config = str(repository / "recipes" / "distributed" / "one_gpu.yaml")
        single[2:2] = ["accelerate.commands.launch", "--config_file", config, "-m"]
    double = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "hf_lm", "train", path]
    double += ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    for words in (single, double):
        result = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 12
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0, atol=1e-5)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["eval_tokens"] == metrics[1]["eval_tokens"]
    assert abs(metrics[0]["bits_per_byte"] - metrics[1]["bits_per_byte"]) < 1e-5
    assert metrics[1]["processes"] == 2
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-3)


def losses_and_weights(folder: str, processes: int) -> list[tuple[list[float], float, str]]:
    """
    Of runs over ragged rows that do not fill an epoch's last batch, with the best checkpoint loaded at the end: losses, the
    sum of the weights' sizes, the best checkpoint's name.
    """
    from datasets import Dataset
    from transformers.trainer_utils import set_seed

    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.data.collator import PackedCollator
    from hf_lm.training import checkpoints as module
    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.trainer import HfLmTrainer

    def slowly(*arguments, **facts):  # whoever does not wait for the checkpoint does not find it
        time.sleep(0.5)
        commit(*arguments, **facts)

    class Loading(HfLmTrainer):
        def _load_best_model(self):
            self.loaded = Path(self.state.best_model_checkpoint, "model.safetensors").is_file()
            super()._load_best_model()

    commit, module.commit = module.commit, slowly
    found = []
    for count, accumulation in ((25, 1), (27, 1), (26, 2), (3, 1)):
        rows = []
        for number in range(count):
            ids = [3 + (number * 7 + place * place) % 90 for place in range(2 + 17 * number % 29)]
            rows.append({"input_ids": ids, "labels": ids, "position_ids": list(range(len(ids)))})
        arguments = HfLmTrainingArguments(
            output_dir=f"{folder}/{count}", per_device_train_batch_size=4 // processes, max_steps=16, logging_steps=1,
            gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=16, save_steps=16, bf16=False,
            load_best_model_at_end=True, report_to="none", disable_tqdm=True, learning_rate=0.01,
        )  # fmt: skip
        set_seed(0)
        model = HfLmForCausalLM(HfLmConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=96))
        rows = Dataset.from_list(rows)
        trainer = Loading(
            model=model, args=arguments, train_dataset=rows, eval_dataset=rows.take(3), data_collator=PackedCollator(2)
        )
        trainer.train()
        assert trainer.loaded
        weight = sum(weight.double().abs().sum().item() for weight in model.parameters())
        found.append((losses(Path(folder, str(count), "checkpoint-16")), weight, trainer.state.best_model_checkpoint))
    return found


@pytest.mark.slow
def test_ends_of_epochs_and_of_runs_are_the_same_for_two_processes(tmp_path):
    expected = losses_and_weights(str(tmp_path / "one"), 1)
    for rank in launch(2, losses_and_weights, str(tmp_path / "two"), 2):
        for (one, weight, _), (two, other, best) in zip(expected, rank, strict=True):
            assert len(one) == len(two) == 16
            torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0, atol=1e-5)
            assert other == pytest.approx(weight, rel=1e-5)
            assert Path(best).parent.parent == tmp_path / "two"


EVALUATED = 13  # rows: neither 2 processes nor any of the batch sizes divide them


def evaluations(folder: str) -> list[dict]:
    """Held-out numbers of the model in `folder`, on rows of 2 to 62 tokens, at several batch sizes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from hf_lm.data.collator import PackedCollator
    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.trainer import HfLmTrainer

    rows = []
    for number in range(EVALUATED):
        ids = [3 + (number * 7 + place * place) % 90 for place in range(2 + 5 * number)]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]], "position_ids": list(range(len(ids)))})
    numbers = []
    for size in (1, 3, 8):
        arguments = HfLmTrainingArguments(
            output_dir=folder, per_device_eval_batch_size=size, report_to="none", bf16=False
        )
        trainer = HfLmTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder),
            args=arguments,
            eval_dataset=Dataset.from_list(rows),
            eval_bytes=[3 * len(row["input_ids"]) for row in rows],
            data_collator=PackedCollator(0),
        )
        found = trainer.evaluate()
        numbers.append(
            {key: value for key, value in found.items() if key.split("_")[-1] not in ("runtime", "time", "second")}
        )
    return numbers


@pytest.mark.slow
def test_held_out_numbers_do_not_depend_on_processes_and_batches(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    expected, *others = evaluations(str(tmp_path))
    assert expected["eval_tokens"] == sum(1 + 5 * number for number in range(EVALUATED))
    for found in [*others, *(numbers for rank in launch(2, evaluations, str(tmp_path)) for numbers in rank)]:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def run_of_one_rank(recipe: str, folder: str) -> set[str]:
    """A run whose processes have an output folder each; what the process opened to write, below `folder`."""
    opened = set()

    def note(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = Path(arguments[0]).absolute()
            if path.is_relative_to(folder):
                opened.add(str(path.relative_to(folder)))

    sys.addaudithook(note)
    code, said = command("train", recipe, "--output_dir", str(Path(folder, "rank" + os.environ["RANK"])))
    assert code == 0, said
    return opened


@pytest.mark.slow
def test_the_first_process_alone_writes(recipe, tmp_path):
    first, second = launch(2, run_of_one_rank, recipe(save_steps=6), str(tmp_path))
    names = {Path(name).name for name in first}  # some are written to `.NAME.tmp` first
    assert names >= {".metrics.json.tmp", "trainer_state.json", "samples.jsonl"}
    # its random numbers are all that a checkpoint needs of it
    states = {f"rank1/checkpoint-{step}/rng_state_1.pth" for step in (6, 12)}
    assert second <= states
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("rank1/**/*") if path.is_file()} == states
    assert (tmp_path / "rank0" / "model.safetensors").exists() and (tmp_path / "rank0" / "loss_curve.png").exists()
    names = [path.name for path in tmp_path.glob("rank0/*")]
    assert len(names) == len(set(names))
    assert len((tmp_path / "rank0" / "samples.jsonl").read_text().splitlines()) == 2  # an evaluation each


@pytest.mark.slow
def test_a_stream_trains_two_processes_as_one(recipe, tmp_path, moby_dick):
    rows = [moby_dick[start : start + 40 + start % 300] for start in range(0, 50_000, 400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    changes = {"train_file": str(tmp_path / "rows.jsonl"), "streaming": True, "validation_split_percentage": 0}
    changes |= {"muon_learning_rate": None, "logging_steps": 1, "save_strategy": "no", "max_steps": 40}  # two passes
    path = recipe(**changes, eval_strategy="no", report_to="none", output_dir=str(tmp_path / "one"))
    assert command("train", path)[0] == 0
    path = recipe(**changes, eval_strategy="no", report_to="none", per_device_train_batch_size=2)
    assert {code for code, _ in launch(2, command, "train", path)} == {0}
    one, two = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert len(one) == len(two) == 40
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_trackio_keeps_the_losses_by_choice(recipe, tmp_path):
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "hf_lm", "train", recipe(), "--report_to", "trackio"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    wanted = {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "eval/bits_per_byte"}
    assert wanted <= set().union(*logged)


@pytest.mark.slow
def test_a_full_disk_leaves_earlier_checkpoints_and_one_line(recipe, tmp_path):
    path = recipe(eval_strategy="no", report_to="none")
    code = """
import resource, sys
from hf_lm.cli import main
from hf_lm.training import checkpoints
commit = checkpoints.commit
def then_no_more_room(*arguments, **facts):
    commit(*arguments, **facts)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as on a full disk, writing fails
checkpoints.commit = then_no_more_room
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(main(["train", sys.argv[1]]))
"""
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("hf-lm train: ")
    checkpoints = sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-4"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = subprocess.run(
        [sys.executable, "-m", "hf_lm", "train", path, "--resume"], capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
