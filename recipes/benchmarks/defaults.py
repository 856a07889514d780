"""
Whether each default of a new model pays: the Moby-Dick recipe, and the recipe with one choice undone.

    python recipes/benchmarks/defaults.py [--seeds 3] [--steps 400] [--choices NAME ...] [--jobs 2] [--json]

Held-out bits per byte after the same number of steps; each choice against the recipe with the same seeds, in pairs, with
the p of a two-sided paired t-test. What is measured depends on the steps, not on the clock: runs take one thread each and
may share the machine. Finished runs are appended to `defaults_runs.jsonl` and not repeated. What a step costs is not in it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

RECIPE = Path(__file__).parents[1] / "moby_dick" / "config.yaml"
RUNS = Path(__file__).with_name("defaults_runs.jsonl")
CHOICES = {  # the keys of the recipe, or fields of its configuration, that are other; None: left out
    "recipe": {},
    "SwiGLU instead of squared ReLU": {"config_overrides": {"mlp_type": "gated", "hidden_act": "silu"}},
    "GELU instead of squared ReLU": {"config_overrides": {"hidden_act": "gelu"}},
    "no norm of queries and keys": {"config_overrides": {"qk_norm": None}},
    "projections not zero at first": {"config_overrides": {"zero_init_residual": False}},
    "a soft cap of the logits": {"config_overrides": {"final_logit_softcapping": 15}},
    "embedding and head not tied": {"config_overrides": {"tie_word_embeddings": False}},
    "AdamW for all": {"muon_learning_rate": None},
    "cosine instead of constant, then linear to zero": {"lr_scheduler_type": "cosine"},
    "weight decay of 0.1": {"weight_decay": 0.1},
    "linear to zero over 60% of the steps": {"lr_decay_ratio": 0.6},
    "what recipes/addresses sets": {
        "config_overrides": {"embedding_multiplier": 11.3},
        "muon_momentum": 0.8,
        "learning_rate": 0.006,
    },
}


def recipe(choice: str) -> dict:
    """The recipe's keys with a choice undone, and without what takes time on the way."""
    keys, changes = yaml.safe_load(RECIPE.read_text(encoding="utf-8")), dict(CHOICES[choice])
    keys["config_overrides"] |= changes.pop("config_overrides", {})
    keys |= {"eval_strategy": "no", "save_strategy": "no", "report_to": "none", "forecast": False, **changes}
    return {name: value for name, value in keys.items() if value is not None}


def train(choice: str, steps: int, seed: int) -> dict:
    """One run of the recipe with one thread; its bits per byte."""
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "recipe.yaml"), Path(folder, "run")
        keys = {"max_steps": steps, "seed": seed, "output_dir": str(output)}
        file.write_text(yaml.safe_dump(recipe(choice) | keys), encoding="utf-8")
        command = [sys.executable, "-m", "hf_lm", "train", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=RECIPE.parents[2], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(done.stderr)
        metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return {"choice": choice, "steps": steps, "seed": seed, "bits_per_byte": metrics["bits_per_byte"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--steps", type=int, default=400, help="of each run (400)")
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES, metavar="NAME", help="which (all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (2)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    from scipy.stats import ttest_rel

    lines = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()] if RUNS.exists() else []

    def run(job: tuple[str, int]) -> dict:
        wanted = {"choice": job[0], "steps": arguments.steps, "seed": job[1]}
        for line in lines:
            if wanted.items() <= line.items():
                return line
        line = train(job[0], arguments.steps, job[1])
        with open(RUNS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    seeds, choices = range(1, arguments.seeds + 1), dict.fromkeys(["recipe", *arguments.choices])
    jobs = [(choice, seed) for seed in seeds for choice in choices]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = dict(zip(jobs, pool.map(run, jobs), strict=True))

    def column(choice: str) -> list[float]:
        return [runs[choice, seed]["bits_per_byte"] for seed in seeds]

    own, result = column("recipe"), {}
    for choice in choices:
        got = column(choice)
        row = {"bits_per_byte": statistics.mean(got)}
        if choice != "recipe" and len(seeds) > 1:
            row |= {"worse_by": statistics.mean(got) - statistics.mean(own), "p": float(ttest_rel(got, own).pvalue)}
        result[choice] = row
    if arguments.json:
        print(json.dumps({"result": result, "runs": list(runs.values())}))
    else:
        for choice, row in result.items():
            print(f"{choice:50}" + "".join(f"  {name} {value:+.3f}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
