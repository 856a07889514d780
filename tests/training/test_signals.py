"""SIGINT and SIGTERM: a checkpoint, then the end; twice: the end, with earlier checkpoints whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_lm.app.run import Interrupted, train
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.training.callbacks import InterruptCallback
from hf_lm.training.checkpoints import damage

COMMITTED = "checkpoint-*/manifest.json"


def start(*command: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, limit: float = 90.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("best", "step"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in ((True, 5), (True, 6), (False, 5), (False, 6))],
)
def test_a_signalled_run_resumes_to_the_same_bits(recipe, tmp_path, monkeypatch, step, best):
    """Also where evaluations are due, with dropout, and where only the best checkpoint would be kept."""
    changes = {"config_overrides": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "residual_dropout": 0.1}, "eval_steps": 3, "save_steps": 3, "sample_prompts": None}  # fmt: skip
    if best:
        changes |= {"load_best_model_at_end": True, "save_total_limit": 1}
    train(*parse_recipe(recipe(**changes, output_dir=str(tmp_path / "straight")), []))

    path = recipe(**changes)
    begin = InterruptCallback.on_step_begin
    with monkeypatch.context() as context:

        def signalled(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        context.setattr(InterruptCallback, "on_step_begin", signalled)
        with pytest.raises(Interrupted) as stop:
            train(*parse_recipe(path, []))
    assert InterruptCallback.on_step_begin is begin
    assert stop.value.exit_code == 128 + signal.SIGTERM
    saved = tmp_path / "run" / f"checkpoint-{step}"
    assert str(saved) in str(stop.value) and damage(saved) is None
    train(*parse_recipe(path, ["--resume"]))
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "run"))
    states = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("straight", "run")]
    assert states[0]["best_global_step"] == states[1]["best_global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once_and_leaves_earlier_checkpoints_whole(recipe, tmp_path, number):
    path = recipe(max_steps=100_000, save_steps=1, save_total_limit=3, eval_strategy="no", report_to="none")
    moments = random.Random(0)
    for attempt in range(3):
        process = start("-m", "hf_lm", "train", path, *(["--resume"] if attempt else []))
        run = tmp_path / "run"
        known = set(run.glob(COMMITTED))
        wait_for(lambda run=run, known=known: set(run.glob(COMMITTED)) - known)
        process.send_signal(number)
        time.sleep(moments.uniform(0, 0.03))
        process.send_signal(number)
        before = time.monotonic()
        process.wait(timeout=60)
        assert time.monotonic() - before < 30
        assert process.returncode in (-number, 128 + number)
        manifests = list(run.glob(COMMITTED))
        assert manifests and not any(damage(path.parent) for path in manifests)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_does_not_take_its_loader_away(recipe, tmp_path, number):
    """As a scheduler or a terminal sends it."""
    path = recipe(max_steps=100_000, save_steps=5, eval_strategy="no", report_to="none", dataloader_num_workers=2)
    process = start("-m", "hf_lm", "train", path, start_new_session=True)
    wait_for(lambda: any((tmp_path / "run").glob(COMMITTED)))
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors[-3000:]
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    assert f"Saved {last}" in errors and damage(last) is None


@pytest.mark.slow
def test_a_run_whose_loader_workers_stay_ends(recipe):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    process = start("-m", "hf_lm", "train", recipe(max_steps=2, report_to="none", **workers))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]


SLOW_COMMIT = """
import os, sys, time
from hf_lm.cli import main
from hf_lm.training import checkpoints
commit = checkpoints.commit
def slowly(*arguments, **facts):
    print("committing", file=sys.stderr, flush=True)
    time.sleep(60)
    commit(*arguments, **facts)
checkpoints.commit = slowly
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_the_disk(recipe, tmp_path, number):
    script = tmp_path / "slow.py"
    script.write_text(SLOW_COMMIT)
    process = start(str(script), recipe(eval_strategy="no", report_to="none", max_steps=100_000, save_steps=1))
    while "committing" not in process.stderr.readline():
        pass
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.2)
    assert process.wait(timeout=20) == -number
    process.stderr.close()


TWO = """
import os, signal, sys
from hf_lm.cli import main
from hf_lm.training.callbacks import InterruptCallback
rank, steps = int(os.environ["RANK"]), [int(step) for step in sys.argv[2].split(",")]
def at_its_step(self, args, state, control, **kwargs):
    if state.global_step == steps[rank]:
        os.kill(os.getpid(), signal.SIGTERM)
InterruptCallback.on_step_begin = at_its_step
code = main(["train", sys.argv[1], *sys.argv[3:]])
print(f"rank {rank} ends with {code}", file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["-1,3", "3,5"])
def test_processes_that_get_a_signal_at_different_steps_stop_at_the_same_one(recipe, tmp_path, steps):
    path = recipe(eval_strategy="no", report_to="none", muon_learning_rate=None)
    script = tmp_path / "two.py"
    script.write_text(TWO)
    process = start("-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), path, steps)
    _, errors = process.communicate(timeout=240)
    for rank in (0, 1):
        assert f"rank {rank} ends with 143" in errors, errors[-3000:]
    assert sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4"]
    assert damage(tmp_path / "run" / "checkpoint-4") is None
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {file.name for file in (tmp_path / "run" / "checkpoint-4").iterdir()}  # fmt: skip
