"""Exit codes: invalid input is one line and 2; a crash is one line and 1, and its traceback is kept in a file."""

import os
import re
import subprocess
import sys
import types

import pytest

from hf_lm.cli import COMMANDS, main
from hf_lm.errors import Failure, keep_traceback


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_the_traceback_of_a_crashed_run_is_in_its_folder(recipe, tmp_path, capsys):
    path = recipe(max_steps=2, save_steps=1, eval_strategy="steps", eval_steps=1, sample_prompts=["the"])
    assert main(["train", path, "--max_steps", "1"]) == 0
    (tmp_path / "run" / "samples.jsonl").unlink()
    (tmp_path / "run" / "samples.jsonl").mkdir()
    capsys.readouterr()
    assert main(["train", path, "--resume", "--allow_changes"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    file = tmp_path / "run" / "crash.txt"
    assert re.match(r"hf-lm train: .*samples\.jsonl.*\(a crash: its traceback is in ", last) and str(file) in last
    text = file.read_text(encoding="utf-8")
    assert text.startswith("Traceback") and "IsADirectoryError" in text and "on_evaluate" in text
    (tmp_path / "run" / "samples.jsonl").rmdir()
    assert main(["train", path, "--resume", "--allow_changes"]) == 0 and not file.exists()


def test_the_traceback_of_another_command_is_in_a_temporary_file(temporary, monkeypatch, capsys):
    command = types.ModuleType("defect")
    command.add_arguments, command.run = lambda parser: None, lambda arguments: [][0]
    monkeypatch.setitem(sys.modules, "hf_lm.cli.defect", command)
    monkeypatch.setitem(COMMANDS, "defect", ("defect", "a command with a defect"))
    assert main(["defect"]) == 1
    (file,) = temporary.iterdir()
    assert capsys.readouterr().err == (
        f"hf-lm defect: list index out of range (a crash: its traceback is in {file})\n"
    )
    assert "IndexError" in file.read_text(encoding="utf-8")
    with pytest.raises(IndexError):
        main(["--debug", "defect"])


def test_a_traceback_is_kept_once_and_a_full_disk_hides_no_error(tmp_path, temporary):
    error = ValueError("a defect")
    assert keep_traceback(error, tmp_path) == keep_traceback(error) == f"in {tmp_path / 'crash.txt'}"
    assert "ValueError: a defect" in (tmp_path / "crash.txt").read_text() and not list(temporary.iterdir())
    assert "--debug" in keep_traceback(ValueError(), tmp_path / "missing")


def test_invalid_input_and_failed_work_keep_no_traceback(tmp_path, temporary, capsys):
    assert main(["card", str(tmp_path / "none")]) == 2
    assert issubclass(Failure, RuntimeError) and not list(temporary.iterdir())
    assert "crash" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "1"}, "1"), ({"OMP_WAIT_POLICY": "active"}, "")]
)
def test_openmp_threads_spin_briefly_unless_the_user_says_otherwise(given, expected):
    code = "import os, sys; sys.argv[0] = 'hf-lm'\nfrom hf_lm.cli import main\ntry: main(['--version'])\n"
    code += "except SystemExit: assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT', ''))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[1] == expected


def test_the_picture_backend_of_a_notebook_is_not_asked_for():
    """A kernel puts its own into the environment; matplotlib refuses to load with one that is not installed."""
    code = "import sys; sys.argv[0] = 'hf-lm'\nfrom hf_lm.cli import main\ntry: main(['--version'])\n"
    code += "except SystemExit: import matplotlib; print(matplotlib.get_backend())"
    environment = os.environ | {"MPLBACKEND": "module://of_another_environment"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split("\n")[1] == "agg", done.stderr[-500:]


def test_a_tokenizer_that_is_not_the_models_is_invalid_input(tiny_model, tmp_path, capsys):
    from hf_lm import train_tokenizer

    tiny_model.save_pretrained(tmp_path)
    train_tokenizer(["the whale and the sea"] * 9, vocab_size=262).save_pretrained(tmp_path)
    assert main(["score", str(tmp_path), "\N{WHALE} \N{LATIN SMALL LETTER THORN}"]) == 2
    assert "beyond the model's vocabulary" in capsys.readouterr().err
