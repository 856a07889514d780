"""What the fuzz tests share: a small trained folder to damage, and a way to run a command and see all it does."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hf_lm import HfLmConfig, HfLmForCausalLM, train_tokenizer

SECONDS = 10  # the longest that any input may take


@dataclass
class Outcome:
    """What a command did."""

    argv: list[str]
    code: int  # exit code; negative: the signal that ended it
    hung: bool
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str
    events: str  # what it should not have done, a line each

    def check(self) -> None:
        """It succeeded, or it said on one line what is wrong; and nothing else happened."""
        said = f"{self.argv}: exit code {self.code} after {self.seconds:.1f} s\n{self.stderr[-3000:]}"
        assert not self.hung, f"hang: {said}"
        assert not self.events, f"{self.events}{said}"
        assert not re.search("Traceback|panicked|a crash: ", self.stderr), said
        if self.argv[0] == "doctor" and self.stdout:  # a finding is a line of its report
            assert self.code == int("FAIL" in self.stdout), said
        elif self.code != 0:
            assert self.code in (1, 2), said
            lines = self.stderr.strip("\n").split("\n")
            assert len(lines) == 1 and lines[0].startswith(f"hf-lm {self.argv[0]}: "), said
            assert len(lines[0]) < 1000, said


def snapshot(folder: Path) -> dict[str, tuple]:
    """Size and time of every file below a folder."""
    found = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    return {str(path): (os.lstat(path).st_size, os.lstat(path).st_mtime_ns) for path in found}


class Machine:
    """A folder to work in, and the process of `fork_server.py`."""

    def __init__(self, folder: Path):
        self.folder, self.home, self.process = folder, folder / "home", None
        self.home.mkdir()
        self.said: dict[str, list[str]] = {}  # every last line on standard error, and a command that printed it

    def start(self) -> None:
        environment = {
            **os.environ,
            **dict.fromkeys(("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            **dict.fromkeys(("HOME", "HF_HOME", "TMPDIR", "MPLCONFIGDIR"), str(self.home)),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # as `main` sets it, before the library is imported
        }
        script = str(Path(__file__).with_name("fork_server.py"))
        self.process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert json.loads(self.process.stdout.readline())["ready"]

    def new_work(self) -> Path:
        """The folder that commands run in, empty."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def __call__(self, *argv: str, seconds: float = SECONDS, stdin: str = "", written: Path | None = None) -> Outcome:
        """
        Run `hf-lm argv` in `folder / "work"`; it may write into `folder / "written"`, which holds a copy of the folder
        `written` and nothing else.
        """
        if self.process is None:
            self.start()
        shutil.rmtree(self.folder / "written", ignore_errors=True)
        (self.folder / "written").mkdir()
        if written is not None:
            shutil.copytree(written, self.folder / "written" / written.name)
        request = {
            "argv": argv,
            "cwd": str(self.folder / "work"),
            "writable": [str(self.folder / "written"), str(self.home)],
            "seconds": seconds,
            "stdin": stdin,
        }
        before = snapshot(self.folder / "work")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        outcome = Outcome(list(argv), **json.loads(self.process.stdout.readline()))
        changed = before.items() ^ snapshot(self.folder / "work").items()
        outcome.events += "".join(f"changed {path}\n" for path, _ in sorted(changed))
        if outcome.code and (last := outcome.stderr.strip("\n").split("\n")[-1]):
            self.said[f"{outcome.code} {last}"] = outcome.argv
        return outcome

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(timeout=20)


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    """`machine("score", "model", "text")` runs the command and gives its `Outcome`."""
    machine = Machine(tmp_path_factory.mktemp("fuzz"))
    yield machine
    machine.stop()
    if report := os.environ.get("FUZZ_MESSAGES"):  # a file that receives what was said, to be read by a person
        lines = (f"{said}\n    {' '.join(argv)}\n" for said, argv in sorted(machine.said.items()))
        Path(report).write_text("".join(lines))


@pytest.fixture(scope="session")
def good_model(tmp_path_factory) -> Path:
    """A finished model folder, small enough to be loaded in a moment. Not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "model"
    tokenizer = train_tokenizer(["the whale and the sea"] * 9, vocab_size=262)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    HfLmForCausalLM(HfLmConfig(**sizes, max_position_embeddings=64, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory, good_model) -> Path:
    """A checkpoint of another family. Not to be changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(good_model, folder, ignore=shutil.ignore_patterns("*.py", "config.json", "*.safetensors"))
    sizes = {"vocab_size": 262, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))
    model.save_pretrained(folder)
    return folder
