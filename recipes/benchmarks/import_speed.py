"""
How long reading a checkpoint of another family and writing it as an hf_lm one takes, and how much memory, against the
library's own class reading and writing it: python recipes/benchmarks/import_speed.py MODEL_FOLDER [--json].

Every run is a process of its own, in the order A B A B ...; time and memory are counted from after the imports. The
medians are compared. `hf-lm import` also runs both models on a text: its time is given apart.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = {"seconds": 1.3, "peak_memory_mb": 1.15}


def measure(kind: str, source: str) -> dict[str, float]:
    """Seconds and peak memory in MB of one conversion, in this process."""
    import psutil
    from transformers import AutoModelForCausalLM

    from hf_lm import HfLmForCausalLM
    from hf_lm.interop.convert import import_checkpoint

    model_class = {"library": AutoModelForCausalLM, "hf_lm": HfLmForCausalLM}.get(kind)
    with tempfile.TemporaryDirectory() as folder:
        before = psutil.Process().memory_info().rss
        start = time.perf_counter()
        if model_class is None:
            import_checkpoint(source, Path(folder) / "model")
        else:
            model_class.from_pretrained(source).save_pretrained(Path(folder) / "model")
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_memory_mb": (peak - before) / 2**20}


def run(kind: str, source: str) -> dict[str, float]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, source, "--measure", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", metavar="MODEL_FOLDER", help="a local checkpoint of another family")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind (default 5)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--measure", choices=("library", "hf_lm", "command"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.source)))
        return 0

    run("library", arguments.source)  # fills the page cache
    runs: dict[str, list] = {"library": [], "hf_lm": []}
    for _ in range(arguments.repeats):
        for kind in runs:
            runs[kind].append(run(kind, arguments.source))
    medians = {
        kind: {name: statistics.median(one[name] for one in results) for name in LIMITS}
        for kind, results in runs.items()
    }
    ratios = {name: medians["hf_lm"][name] / medians["library"][name] for name in LIMITS}
    command = run("command", arguments.source)
    result = {"medians": medians, "ratios": ratios, "limits": LIMITS, "import_command": command, "runs": runs}
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, limit in LIMITS.items():
            mine, theirs = medians["hf_lm"][name], medians["library"][name]
            print(f"{name}: hf_lm {mine:.3f}, library {theirs:.3f}, ratio {ratios[name]:.2f} (at most {limit})")
        print(f"hf-lm import with its comparison on text: {command['seconds']:.1f} s")
    return int(any(ratios[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
