"""The notebook for newcomers: it runs, and what it names exists."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from hf_lm.cli import COMMANDS

GUIDES = Path(__file__).parents[2] / "recipes" / "guides"
NOTEBOOK = GUIDES / "first_model.ipynb"


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_no_outputs_are_stored():
    """They would be those of one machine, and would change with each run."""
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_links_and_commands_exist():
    for cell in cells("markdown"):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", "".join(cell["source"])):
            assert (GUIDES / link).exists(), link
    commands = re.findall(r"^!hf-lm (\S+)", "\n".join("".join(cell["source"]) for cell in cells("code")), re.M)
    assert {"train", "inspect", "export"} <= set(commands) <= set(COMMANDS)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """With 8 steps on a chapter: a cell is added after the one that is tagged `parameters`."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    whole = (GUIDES.parent / "moby_dick" / "data" / "moby_dick.txt").read_text(encoding="utf-8")
    (tmp_path / "chapter.txt").write_text(whole[:60_000], encoding="utf-8")
    (place,) = [place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    changed = {"text": str(tmp_path / "chapter.txt"), "steps": 8, "folder": str(tmp_path / "model")}
    source = "\n".join(f"{name} = {value!r}" for name, value in changed.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    for cell in notebook.cells:  # a command that fails does not stop a notebook
        if cell.cell_type == "code":
            cell.source = re.sub(r"^!.*$", r"\g<0>\nassert _exit_code == 0", cell.source, flags=re.M)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(GUIDES)}}
    ).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert 1 < float(re.search(r"this model: (\d+\.\d+) bits per byte", printed)[1]) < 8
    assert re.search(r"'[^']*Ġ?sea'?.* bits   expected", printed)
    assert (tmp_path / "model" / "inspect.html").stat().st_size > 1000
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert "parity in llama.cpp" in printed
    written = re.search(r"llama\.cpp: +The white whale(.*)^transformers: The white whale(.*)", printed, re.M | re.S)
    assert all(len(text) > 20 for text in written.groups())  # after 8 steps these may be line breaks
