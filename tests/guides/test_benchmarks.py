"""The benchmark pages and the log show what was recorded, and the harness that records measures what it says."""

import argparse
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lm.cli import COMMANDS

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "recipes" / "benchmarks"
LOG = REPOSITORY / "recipes" / "LOG.md"
AREAS = sorted((REPOSITORY / "recipes" / "log").glob("*.md"))
PAGES = [page for page in sorted(BENCHMARKS.glob("*.md")) if page.name != "README.md"]
SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if path.stem not in ("harness", "render")]
DATA = [file for folder in (BENCHMARKS, LOG.with_name("log")) for file in sorted((folder / "records").glob("*.jsonl"))]
DATA.remove(BENCHMARKS / "records" / "machines.jsonl")
HEADINGS = ["Question", "Command", "Setup", "Result", "What it means", "Data"]
VERDICTS = {"adopted", "partly adopted", "rejected", "open", "finding"}

TOY = """
import os, time
import harness

def measure(side, delay, calls, seed=0):
    with open(calls, "a") as file:
        file.write(side + " ")
    if side == "broken":
        raise ValueError("no such side")
    seconds = delay if side == "slow" else delay / 4
    with harness.PeakMemory() as memory:
        held = b"1" * (20 * 2**20)
        time.sleep(0.1)
    return {"seconds": seconds, "peak_mb": memory.peak_mb, "process": os.getpid(), "words": "are left out"}

def build_parser():
    parser = harness.build_parser("Toy. More of it.")
    parser.add_argument("calls")
    parser.add_argument("--sides", nargs="+", default=["slow", "fast"])
    return parser

def compare(bench):
    private = {"calls": bench.arguments.calls}
    bench.compare({"delay": 0.02}, bench.arguments.sides, private=private)
    bench.run_all([{"delay": 0.01, "seed": 3}], side=lambda case: "fast", private=lambda case: private)
    return 0

if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
"""


@pytest.fixture
def run_toy(tmp_path):
    """Run a toy benchmark; its exit code, stderr, records, and the sides in the order in which they were measured."""
    (tmp_path / "toy.py").write_text(TOY, encoding="utf-8")

    def run(*words: str):
        command = [sys.executable, "toy.py", "calls.txt", "--output", "out.jsonl", *words]
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        file = tmp_path / "out.jsonl"
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        return done, records, (tmp_path / "calls.txt").read_text(encoding="utf-8").split()

    return run


def test_the_harness_measures_in_turn_in_processes_of_their_own(run_toy):
    done, (record, single), order = run_toy("--rounds", "3", "--machine", "toy machine")
    assert done.returncode == 0, done.stderr
    assert order == ["slow", "fast"] * 3 + ["fast"]
    processes = [numbers["process"] for measured in record["rounds"] for numbers in measured.values()]
    assert len(set(processes)) == 6
    assert record["numbers"]["sides"]["slow"]["seconds"] == 0.02
    assert 18 < record["numbers"]["sides"]["slow"]["peak_mb"] < 40
    assert record["numbers"]["ratio"]["fast"]["seconds"] == {"median": 0.25, "lowest": 0.25, "highest": 0.25}
    assert (record["machine"], record["case"], record["raw"]) == ("toy machine", {"delay": 0.02}, True)
    assert record["recipe"]["file"] == "toy.py" and len(record["recipe"]["sha256"]) == 16
    assert {"python", "torch", "transformers", "processor", "load"} <= set(record["environment"])
    assert (single["case"], single["seed"], single["numbers"]["seconds"]) == ({"delay": 0.01}, 3, 0.0025)


def test_a_finished_run_is_not_measured_again(run_toy):
    run_toy("--rounds", "1")
    _, records, order = run_toy("--rounds", "1")
    assert order == ["slow", "fast", "fast", "slow", "fast"]  # the single run is there, comparisons are repeated
    assert [record["seed"] for record in records] == [None, 3, None]


def test_a_measurement_that_fails_ends_the_benchmark_with_its_error(run_toy):
    done, records, _ = run_toy("--sides", "broken")
    assert done.returncode == 1 and "ValueError: no such side" in done.stderr and not records


def test_a_table_is_made_of_the_last_record_of_each_case(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = importlib.import_module("render").table
    (tmp_path / "speed.amx.jsonl").write_text(
        "".join(
            json.dumps({"machine": "amx", "seed": None, "case": {"rows": rows}, "numbers": {"ratio": ratio}}) + "\n"
            for rows, ratio in ((1000, 1.1), (2000, 1.2), (1000, 1.5))
        )
    )
    columns = {"rows": "{rows:,}", "times": {"show": "{ratio:.2f}", "goal": ">= 1.4"}}
    text = table({"data": "speed.*", "columns": columns}, tmp_path)
    assert text.splitlines()[2:] == ["| 1,000 | **1.50** |", "| 2,000 | 1.20 |"]
    with pytest.raises(SystemExit, match="no record fills the columns"):
        table({"data": "speed.*", "columns": {**columns, "memory": "{memory}"}}, tmp_path)
    with pytest.raises(SystemExit, match="no such data"):
        table({"data": "other", "columns": columns}, tmp_path)


def test_pages_show_what_is_recorded():
    command = [sys.executable, str(BENCHMARKS / "render.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"run python recipes/benchmarks/render.py\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_headings_and_its_data(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.M) == HEADINGS
    shown = re.findall(r"^data: (.+)$|^- ([\w.*]+)$", text, re.M)
    assert shown and f"({page.name})" in (BENCHMARKS / "README.md").read_text(encoding="utf-8")


def test_each_script_has_a_page_that_runs_it():
    for script in SCRIPTS:
        text = (BENCHMARKS / f"{script.stem}.md").read_text(encoding="utf-8")
        assert f"python recipes/benchmarks/{script.name}" in text, script.name


def test_commands_of_the_pages_exist(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    scripts = {}
    for page in PAGES:
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        assert lines, page.name
        for line in lines:
            words = shlex.split(line)
            if words[0] == "hf-lm":
                parser = argparse.ArgumentParser()
                importlib.import_module(f"hf_lm.cli.{COMMANDS[words[1]][0]}").add_arguments(parser)
                assert Path(words[2]).exists() and parser.parse_known_args(words[2:]), line
            else:
                assert words[0] == "python" and Path(words[1]).exists(), line
                scripts.setdefault(Path(words[1]).stem, []).append(words[2:])
    code = """
import importlib, json, sys
for name, calls in json.loads(sys.argv[1]).items():
    for words in calls:
        importlib.import_module(name).build_parser().parse_args(words)
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", code, json.dumps(scripts)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", DATA, ids=lambda file: f"{file.parent.parent.name}/{file.stem}")
def test_records_are_complete(file):
    machines = (BENCHMARKS / "records" / "machines.jsonl").read_text(encoding="utf-8").splitlines()
    known = {json.loads(line)["machine"] for line in machines}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        fields = {"benchmark", "machine", "date", "commit", "recipe", "seed", "raw", "case", "numbers"}
        assert fields <= set(record), line
        assert record["machine"] in known and re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"]), line
        assert record["raw"] or re.search(r" at [0-9a-f]{7}$", record["source"]), line
        assert not set(record["case"]) & set(record["numbers"]), line


def test_entries_of_the_log_are_complete():
    for area in AREAS:
        text = area.read_text(encoding="utf-8")
        entries = re.split(r"^## ", text, flags=re.M)[1:]
        assert entries, area
        for entry in entries:
            heading = entry.splitlines()[0]
            assert heading.rpartition(": ")[2] in VERDICTS, heading
            effect = re.search(r"^\d{4}-\d\d-\d\d\. Effect: (.+?)\n\n", entry, re.M | re.S)
            assert effect, heading
            parts = re.findall(r"^\*\*(\w+)\*\*", entry, re.M)
            assert parts == ["Question", "Setup", "Result", "Decision", "Commit"], heading
            rest = entry.replace(effect[0], "")
            for number in re.findall(r"\d[\d,]*\.?\d*", effect[1]):
                assert number.rstrip(".,") in rest, f"{heading}: {number} stands in the effect alone"


def test_links_of_the_pages_and_the_log_lead_somewhere():
    for page in [*PAGES, BENCHMARKS / "README.md", LOG, *AREAS]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = page.parent / path
            assert target.exists(), f"{page}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{page}: {link}"


def test_prose_is_not_wider_than_the_code():
    for page in [*PAGES, BENCHMARKS / "README.md", LOG, *AREAS]:
        text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert [line for line in text.splitlines() if len(line) > 119 and line[0] != "|"] == [], page
