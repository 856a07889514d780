"""
Held-out bits per byte as a function of model size and training, for `hf-lm plan CONFIG.yaml --budget`:

    python recipes/benchmarks/scaling.py sweep            # trains the grid below; several at once share the work
    python recipes/benchmarks/scaling.py fit              # the law's constants, for hf_lm/analysis/scaling.py
    python recipes/benchmarks/scaling.py check 60 120 300 # trains what the plan says for so many seconds

The sweep is that of `recipes/addresses` with other sizes and steps, each run to the end of its own learning-rate schedule;
results are appended to `scaling_runs.jsonl`. It counts tokens, not time: it may run beside other work. `check` needs the
machine for itself.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "addresses" / "config.yaml"
RUNS = Path(__file__).with_name("scaling_runs.jsonl")
BLOCK = 128
GRID = [  # hidden size, layers, vocabulary, sequences of a batch, tokens
    *((size, layers, 2048, 8, tokens) for tokens in (200_000, 600_000, 1_600_000)
      for size, layers in ((64, 4), (128, 6), (192, 6), (256, 8))),
    *((128, 6, vocabulary, 8, tokens) for vocabulary in (1024, 4096) for tokens in (200_000, 600_000, 1_600_000)),
    *((128, 6, 2048, batch, tokens) for batch in (16, 32) for tokens in (600_000, 1_600_000)),
    (192, 6, 4096, 8, 600_000), (192, 6, 4096, 16, 1_600_000), (192, 6, 2048, 4, 600_000),
]  # fmt: skip


def train(overrides: list[str]) -> dict:
    """The metrics of a run of the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_lm", "train", str(RECIPE), "--output_dir", f"{folder}/run", *overrides]
        command += ["--save_strategy", "no", "--report_to", "none"]
        subprocess.run(command, check=True, cwd=RECIPE.parents[2])
        return json.loads(Path(folder, "run", "metrics.json").read_text())


def keys(size: int, layers: int, vocabulary: int, batch: int, tokens: int) -> list[str]:
    """One point of the grid as overrides of the recipe."""
    shape = {"hidden_size": size, "num_hidden_layers": layers, "num_attention_heads": size // 32}
    overrides = ",".join(f"{name}={value}" for name, value in shape.items()) + ",final_logit_softcapping=15"
    return [
        "--config_overrides", overrides, "--vocab_size", str(vocabulary), "--per_device_train_batch_size", str(batch),
        "--max_steps", str(round(tokens / (batch * BLOCK))),
    ]  # fmt: skip


def sweep() -> None:
    """Train every point that has no result; a file marks those that another process has taken."""
    taken = Path(tempfile.gettempdir(), "hf_lm_scaling")
    taken.mkdir(exist_ok=True)
    for point in GRID:
        done = [json.loads(line)["point"] for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
        mark = taken / "-".join(map(str, point))
        if list(point) in done or mark.exists():
            continue
        mark.touch()
        metrics = train([*keys(*point), "--forecast", "false", "--eval_strategy", "no"])
        result = {"point": point, **{name: metrics[name] for name in ("parameters", "train_tokens", "bits_per_byte")}}
        with open(RUNS, "a") as file:
            file.write(json.dumps(result) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("sweep",))
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    {"sweep": sweep}[arguments.what]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
