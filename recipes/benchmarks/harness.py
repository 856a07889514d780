"""
Shared harness of the benchmarks: a process per measurement, rounds in turn, medians, ratios, records.

A script states what its sides are and how one of them is measured; `compare` does the rest:

    def measure(side: str, **case) -> dict[str, float]: ...

    def compare(bench: harness.Bench) -> int:
        bench.compare({"rows": 2048}, sides=("plain", "chunked"))
        return 0

    if __name__ == "__main__":
        raise SystemExit(harness.main(build_parser(), measure, compare))

`--machine NAME` appends one JSON line per case to `records/SCRIPT.NAME.jsonl`, from which `render.py` makes the tables
of the pages. Without it nothing is recorded.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECORDS = Path(__file__).with_name("records")
REPOSITORY = Path(__file__).parents[2]
FIELDS = ("benchmark", "machine", "date", "commit", "recipe", "seed", "raw", "case", "numbers")
FLAG = "--measure"


def build_parser(description: str, rounds: int = 3) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has; `rounds` is the default of `--rounds`."""
    parser = argparse.ArgumentParser(description=description.strip().split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds, help=f"measurements of each side, in turn ({rounds})")
    parser.add_argument("--machine", help="name of this machine: append the result to records/BENCHMARK.NAME.jsonl")
    parser.add_argument("--output", metavar="FILE", help="append the result to this file instead")
    return parser


def main(parser: argparse.ArgumentParser, measure: Callable[..., dict], compare: Callable[["Bench"], int]) -> int:
    """Run the comparison, or one measurement if this is a process that the harness started."""
    if sys.argv[1:2] == [FLAG]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return 0
    return compare(Bench(Path(sys.argv[0]).resolve(), parser.parse_args()))


class Bench:
    """
    One call of a benchmark script: its arguments, and the records that it makes.

    :param script: the script whose `measure` is called, in processes of its own.
    :param arguments: what `build_parser` parsed.
    """

    def __init__(self, script: Path, arguments: argparse.Namespace):
        self.script, self.arguments = script, arguments
        self.name, self.machine = script.stem, arguments.machine or "unnamed"
        self.output = Path(arguments.output) if arguments.output else None
        if arguments.machine and not self.output:
            self.output = RECORDS / f"{self.name}.{arguments.machine}.jsonl"
        self.commit, self.facts = current_commit(), environment()
        self.lock = threading.Lock()
        if not self.output:
            print("not recorded: name the machine with --machine", file=sys.stderr)

    def run(self, side: str, case: dict, threads: int = 0) -> dict:
        """
        Measure one side of a case in a new process.

        :param threads: the process's OMP_NUM_THREADS; 0 leaves the environment's.
        :raises SystemExit: with the last lines of what the process wrote if it failed.
        """
        command = [sys.executable, str(self.script), FLAG, json.dumps({"side": side, **case})]
        settings = {"HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
        if done.returncode:
            raise SystemExit(f"{side} {case} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    def compare(self, case: dict, sides: Sequence[str], *, private: dict | None = None, warm_up: bool = False,
                recipe: Path | None = None, seed: int | None = None, threads: int = 0) -> dict:  # fmt: skip
        """
        Measure all sides in turn, `--rounds` times, and record medians and ratios to the first side.

        :param private: further arguments of `measure` that are not part of the case, such as temporary folders.
        :param warm_up: measure the first side once before, without counting it (fills the page cache).
        :param recipe: the recipe that is trained; the script where there is none.
        :returns: the record.
        """
        inputs = {**case, **(private or {})}
        if warm_up:
            self.run(sides[0], inputs, threads)
        rounds = [
            {side: self.run(side, inputs, threads) for side in sides} for _ in range(max(1, self.arguments.rounds))
        ]
        record = self.record(case, summarize(rounds), recipe, seed, threads, rounds=rounds)
        print_record(record)
        return record

    def run_all(self, cases: Iterable[dict], *, side: Callable[[dict], str], jobs: int = 1, threads: int = 0,
                recipe: Path | None = None, private: Callable[[dict], dict] = lambda _: {}) -> list[dict]:  # fmt: skip
        """
        Measure each case once, `jobs` at a time, and record each result as soon as it is there.

        A case with a record is not measured again, so a call that was stopped continues where it was. A case's `seed`
        becomes the record's.

        :param side: gives the side of a case.
        :param private: gives further arguments of `measure` for a case.
        """

        def measure_once(case: dict) -> dict:
            seed = case.get("seed")
            if known := self.find(case):
                return known[-1]
            numbers = self.run(side(case), {**case, **private(case)}, threads)
            measured = {name: value for name, value in case.items() if name != "seed"}
            return self.record(measured, numbers, recipe, seed, threads)

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(measure_once, cases))

    def find(self, case: dict) -> list[dict]:
        """The records of a case (and seed) in the file that is appended to."""
        seed = case.get("seed")
        wanted = {name: value for name, value in case.items() if name != "seed"}
        records = read_records([self.output]) if self.output else []
        return [record for record in records if record["case"] == wanted and record["seed"] == seed]

    def record(self, case: dict, numbers: dict, recipe: Path | None = None, seed: int | None = None,
               threads: int = 0, **more) -> dict:  # fmt: skip
        """Make a record of measured numbers and append it to the output, if there is one."""
        record = {
            "benchmark": self.name, "machine": self.machine, "date": datetime.date.today().isoformat(),
            "commit": self.commit, "recipe": hashed(recipe or self.script), "seed": seed, "raw": True, "case": case,
            "numbers": numbers, **more, "environment": self.facts | ({"threads": threads} if threads else {}),
        }  # fmt: skip
        if self.output:
            with self.lock, open(self.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        return record


def summarize(rounds: list[dict[str, dict]]) -> dict:
    """
    Medians of each side, and ratios to the first one.

    :param rounds: of each round, the numbers of each side.
    :returns: `sides[side][name]`, the median, and `ratio[side][name]` with `median`, `lowest` and `highest` of the
        ratios that were taken round by round.
    """
    baseline = next(iter(rounds[0]))
    sides, ratio = {}, {}
    for side, first in rounds[0].items():
        names = [name for name, value in first.items() if isinstance(value, int | float)]
        sides[side] = {name: statistics.median(found[side][name] for found in rounds) for name in names}
        if side == baseline:
            continue
        ratio[side] = {}
        for name in names:
            pairs = [(found[side][name], found[baseline].get(name)) for found in rounds]
            if all(other for _, other in pairs):
                values = [own / other for own, other in pairs]
                ratio[side][name] = {
                    "median": statistics.median(values), "lowest": min(values), "highest": max(values)
                }  # fmt: skip
    return {"sides": sides, "ratio": ratio}


def print_record(record: dict) -> None:
    """Print a comparison as a table: a line per side, and one for its ratios to the first side."""
    print(", ".join(f"{name} {value}" for name, value in record["case"].items()))
    for side, values in record["numbers"]["sides"].items():
        print(f"  {side:14}" + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        ratios = record["numbers"]["ratio"].get(side, {})
        spans = (f"{name} {r['median']:.3f} ({r['lowest']:.3f}-{r['highest']:.3f})" for name, r in ratios.items())
        if ratios:
            print(f"  {'  ratio':14}" + "  ".join(spans), flush=True)


def read_records(paths: Iterable[Path]) -> list[dict]:
    """Read the records of JSONL files, in order; a file that does not exist has none."""
    lines = [line for path in paths if path.exists() for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines if line]


def hashed(path: Path) -> dict:
    """A recipe's or script's path in the repository and the start of its SHA-256."""
    path = Path(path).resolve()
    name = path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path.name
    return {"file": str(name), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def current_commit() -> str | None:
    """The commit that is checked out, with `-dirty` where files differ from it; None outside a clone."""
    asked = ["git", "describe", "--always", "--abbrev=7", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def environment() -> dict:
    """Versions, processor, threads and load of this machine at the start of a benchmark."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


class PeakMemory:
    """
    Context manager: the highest private memory of this process above that at its start, in MB (`peak_mb`).

    Private is RSS without file-backed pages, which the system can drop. Sampled every 20 ms.
    """

    def __init__(self):
        import psutil

        self.process, self.peak_mb = psutil.Process(), 0.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _private_mb(self) -> float:
        memory = self.process.memory_info()
        return (memory.rss - getattr(memory, "shared", 0)) / 2**20

    def _watch(self) -> None:
        while not self.stopped.wait(0.02):
            self.peak_mb = max(self.peak_mb, self._private_mb() - self.start_mb)

    def __enter__(self) -> "PeakMemory":
        self.start_mb = self._private_mb()
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stopped.set()
        self.thread.join()


def train_recipe(recipe: Path, keys: dict, arguments: Sequence[str] = ()) -> dict:
    """
    Run `hf-lm train` on a recipe in a temporary folder, without what takes time on the way.

    :param keys: recipe keys, written into a copy of the recipe; None leaves a key out.
    :param arguments: further words of the command line.
    :returns: the run's metrics.json.
    :raises SystemExit: with the last lines of what the run wrote if it failed.
    """
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, recipe.name), Path(folder, "run")
        whole = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"save_strategy": "no", "report_to": "none"}
        whole |= {**keys, "output_dir": str(output)}
        whole = {name: value for name, value in whole.items() if value is not None}
        file.write_text(yaml.safe_dump(whole), encoding="utf-8")
        command = [sys.executable, "-m", "hf_lm", "train", str(file), *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return json.loads((output / "metrics.json").read_text(encoding="utf-8"))
