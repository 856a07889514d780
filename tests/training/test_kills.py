"""
A run that is killed (-9) again and again, at any moment, ends with the same bits as one that is not.

Every case is killed at least ten times, up to five times on one run: 110 and more kills in all.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_lm.training.checkpoints import UNCOMMITTED
from hf_lm.training.manifest import MANIFEST

KILLS, IN_A_ROW = 10, 5  # of each case, at least; of one run, at most
PRELOADED = [
    "hf_lm.cli.train", "hf_lm.app.run", "hf_lm.tasks.language_modeling", "hf_lm.hub.card",
    "matplotlib.pyplot", "transformers.models.auto.modeling_auto", "torch.distributed", "datasets", "accelerate",
    "transformers.integrations", "torch._dynamo", "killed_run",
]  # fmt: skip

STREAM = {"streaming": True, "max_steps": 12}
CASES = {
    "epochs": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    "loader workers": {"dataloader_num_workers": 2},
    "bfloat16": {"bf16": True},
    "AdamW alone": {"muon_learning_rate": None, "lr_scheduler_type": "cosine"},
    "held-out scores": {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
    "stream": STREAM,
    "shuffled stream": {**STREAM, "shuffle_buffer_size": 16, "gradient_accumulation_steps": 2},
    "stream with loader workers": {**STREAM, "shuffle_buffer_size": 16, "dataloader_num_workers": 2},
    "two processes": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "two processes, stream": {**STREAM, "shuffle_buffer_size": 16},
}


@pytest.fixture(scope="module")
def server():
    """Processes that have imported everything: importing takes longer than a run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    yield context
    from multiprocessing import forkserver

    forkserver._forkserver._stop()


class Run:
    """One training run of one or two processes."""

    def __init__(self, server, folder: Path, recipe: str, processes: int, resume: bool, slow_disk: bool = True):
        self.log = folder / "log.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        overrides = ["--output_dir", str(folder / "run"), *(["--resume"] if resume else [])]
        from killed_run import run

        self.processes, self.announced = [], []  # of each process the end of its pipe
        for rank in range(processes):
            environment = {}
            if processes > 1:
                environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            announced, announce = server.Pipe(duplex=False)
            arguments = (recipe, overrides, str(self.log), environment, slow_disk, announce)
            process = server.Process(target=run, args=arguments)
            process.start()
            announce.close()
            self.processes.append(process)
            self.announced.append(announced)

    def wait_for_batches(self, count: int, limit: float = 120.0) -> bool:
        """Whether so many batches were announced before the run ended."""
        deadline = time.monotonic() + limit
        for _ in range(count):
            if not self.announced[0].poll(max(0.0, deadline - time.monotonic())):
                return False
            try:
                self.announced[0].recv_bytes()
            except EOFError:
                return False
        return True

    def wait_for(self, folder: Path, pattern: str, limit: float = 5.0) -> None:
        deadline = time.monotonic() + limit
        while not any(folder.glob(pattern)) and time.monotonic() < deadline:
            time.sleep(0.001)

    def finish(self, limit: float = 120.0) -> None:
        for process in self.processes:
            process.join(limit)
        codes = [process.exitcode for process in self.processes]
        assert codes == [0] * len(codes), self.log.read_text()[-3000:]

    def kill(self, first: int, pause: float) -> bool:
        """Kill one process, a little later the others; whether the first of them was still running."""
        order = self.processes[first:] + self.processes[:first]
        running = order[0].is_alive()
        for process in order:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has no group yet, or has just ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                time.sleep(pause)
        for process in order:
            process.join(60)
        return running and order[0].exitcode == -signal.SIGKILL


@pytest.fixture
def recipe(tmp_path, moby_dick):
    """`recipe(**changes)` writes a recipe of ragged documents, dropout and a checkpoint at each step."""
    rows = [moby_dick[start : start + 20 + start % 190] for start in range(0, 6_000, 150)]
    for name, part in (("train", rows[::2]), ("more", rows[1::2]), ("held_out", rows[:4])):
        lines = (json.dumps({"text": row}) for row in part)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def write(**changes) -> str:
        keys = {
            "train_file": [str(tmp_path / "train.jsonl"), str(tmp_path / "more.jsonl")],
            "validation_split_percentage": 0,
            "block_size": 48,
            "tokenizer_kind": "byte",
            "config_overrides": {
                "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "residual_dropout": 0.1,
            },
            "muon_learning_rate": 0.02,
            "learning_rate": 0.01,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 24,
            "logging_steps": 1,
            "save_steps": 1,
            "save_total_limit": 2,
            "bf16": False,
            "report_to": "none",
            "forecast": False,
            **changes,
        }  # fmt: skip
        if keys.get("eval_strategy") == "steps":
            keys["validation_file"] = str(tmp_path / "held_out.jsonl")
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / "model.safetensors")


def kill_again_and_again(
    server, folder: Path, recipe: str, processes: int, batches: int
) -> tuple[int, int, list[int]]:
    """
    Start a run, kill it, resume it, kill it ...; at last let it end.

    Returns:
        How often it was killed, how often in the middle of saving, and the steps from which it went on.
    """
    folder.mkdir()
    moments = random.Random(str(folder.name))
    kills, in_saving, steps = 0, 0, []

    def start() -> Run:
        saved = [int(path.parent.name.split("-")[1]) for path in (folder / "run").glob(f"checkpoint-*/{MANIFEST}")]
        if saved:
            steps.append(max(saved))
        else:  # a new run, as a person would do
            shutil.rmtree(folder / "run", ignore_errors=True)
        return Run(server, folder, recipe, processes, resume=bool(saved))

    for _ in range(IN_A_ROW):
        run = start()
        if moments.random() < 0.2:  # at any moment, that of starting too
            time.sleep(moments.uniform(0, 1))
        elif run.wait_for_batches(moments.randint(2, batches // 3)):
            if moments.random() < 0.3:  # in the next saving
                run.wait_for(folder / "run", f"checkpoint-*/{UNCOMMITTED}")
            time.sleep(moments.uniform(0, 0.15))
        if run.kill(moments.randrange(processes), moments.choice([0, 0.05])):
            kills += 1
            in_saving += any((folder / "run").glob(f"checkpoint-*/{UNCOMMITTED}"))
    start().finish()
    return kills, in_saving, steps


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(server, recipe, tmp_path, case):
    path, processes = recipe(**CASES[case]), 2 if case.startswith("two") else 1
    straight = tmp_path / "straight"
    straight.mkdir()
    Run(server, straight, path, processes, resume=False, slow_disk=False).finish()
    expected = weights(straight)
    state = json.loads((straight / "run" / "trainer_state.json").read_text())
    batches = state["max_steps"] * CASES[case].get("gradient_accumulation_steps", 1)
    assert batches >= 9

    kills, in_saving, steps = 0, 0, []
    folders = (tmp_path / f"{case} {number}" for number in itertools.count())
    with ThreadPoolExecutor(2) as two_at_once:
        while kills < KILLS or max(steps, default=0) <= state["max_steps"] // 3:  # the first time through the data
            pair = list(itertools.islice(folders, 2))
            done = [two_at_once.submit(kill_again_and_again, server, one, path, processes, batches) for one in pair]
            for run in done:
                kills, in_saving = kills + run.result()[0], in_saving + run.result()[1]
                steps += run.result()[2]
            for folder in pair:
                got = weights(folder)
                assert got.keys() == expected.keys()
                different = [name for name in expected if not torch.equal(got[name], expected[name])]
                assert not different, f"{different}\n{(folder / 'log.txt').read_text()[-3000:]}"
    print(f"{case}: killed {kills} times, {in_saving} of them in saving; went on from steps {sorted(steps)}")
    assert in_saving > 0
