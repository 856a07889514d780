"""Several processes, a full disk: what needs a process of its own."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_and_evaluate_as_one(recipe, tmp_path, moby_dick, launcher):
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
    double = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "hf_lm", "train", path]
    double += ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    for command in (single, double):
        result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
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


@pytest.mark.slow
def test_trackio_keeps_the_losses_by_choice(recipe, tmp_path):
    environment = {**ENVIRONMENT, "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-m", "hf_lm", "train", recipe(), "--report_to", "trackio"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    assert any("eval/bits_per_byte" in row for row in logged)


def test_a_full_disk_leaves_earlier_checkpoints_and_one_line(recipe, tmp_path):
    path = recipe(eval_strategy="no", report_to="none")
    code = """
import resource, sys
from hf_lm.cli import main
from hf_lm.training import checkpoints, trainer
seal = trainer.seal
def then_no_more_room(*arguments, **facts):
    seal(*arguments, **facts)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as on a full disk, writing fails
trainer.seal = then_no_more_room
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.exit(main(["train", sys.argv[1]]))
"""
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("hf-lm train: ")
    checkpoints = sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-4"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    resumed = subprocess.run(
        [sys.executable, "-m", "hf_lm", "train", path, "--resume"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
