"""
Held-out bits per byte as a function of model size and training, for `hf-lm plan CONFIG.yaml --budget`:

    python recipes/benchmarks/scaling.py sweep            # trains the grid below; several at once share the work
    python recipes/benchmarks/scaling.py fit              # the law's constants, for hf_lm/planning/scaling.py
    python recipes/benchmarks/scaling.py check 60 120 300 # trains what the plan says for so many seconds

The sweep is that of `recipes/addresses` with other sizes and steps, each run to the end of its own learning-rate schedule;
results are appended to `scaling_runs.jsonl`. It counts tokens, not time: it may run beside other work. `check` needs the
machine for itself.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

RECIPE = Path(__file__).parents[1] / "addresses" / "config.yaml"
RUNS = Path(__file__).with_name("scaling_runs.jsonl")
BLOCK = 128
# What a size can reach at best does not depend on how it is trained: from 28 runs of the recipe as it was before
# 2026-11-26, of up to 6.3 million parameters. Runs as few and as small as those below do not tell.
FLOOR, ALPHA, DELTA = 0.6756, 0.3959, 0.1847
GRID = [  # hidden size, layers, vocabulary, sequences of a batch, tokens
    (128, 6, 4096, 32, 2_834_432),  # the recipe itself
    *((size, layers, 2048, 8, 200_000) for size, layers in ((64, 4), (128, 6), (192, 6))),
    *((128, 6, vocabulary, 8, 200_000) for vocabulary in (1024, 4096)),
    (64, 4, 2048, 32, 200_000), (128, 6, 2048, 32, 200_000), (64, 4, 4096, 16, 400_000),
    *((size, layers, 2048, 8, 600_000) for size, layers in ((64, 4), (128, 6))), (128, 6, 4096, 8, 600_000),
    (64, 4, 4096, 32, 600_000), (128, 6, 2048, 32, 600_000), (96, 5, 4096, 32, 800_000),
    (64, 4, 2048, 8, 1_600_000),
]  # fmt: skip


def train(overrides: list[str]) -> dict:
    """The metrics of a run of the recipe."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_lm", "train", str(RECIPE), "--output_dir", f"{folder}/run", *overrides]
        command += ["--save_strategy", "no", "--report_to", "none"]
        subprocess.run(command, check=True, cwd=RECIPE.parents[2])
        return json.loads(Path(folder, "run", "metrics.json").read_text(encoding="utf-8"))


def keys(size: int, layers: int, vocabulary: int, batch: int, tokens: int) -> list[str]:
    """One point of the grid as overrides of the recipe."""
    from hf_lm.planning.scaling import as_overrides

    fields = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["config_overrides"]
    return [
        "--config_overrides", as_overrides(fields, size, layers), "--vocab_size", str(vocabulary),
        "--per_device_train_batch_size", str(batch), "--max_steps", str(round(tokens / (batch * BLOCK))),
    ]  # fmt: skip


def sweep() -> None:
    """Train every point that has no result; a file marks those that another process has taken."""
    taken = Path(tempfile.gettempdir(), "hf_lm_scaling")
    taken.mkdir(exist_ok=True)
    for point in GRID:
        done = (
            [json.loads(line)["point"] for line in RUNS.read_text(encoding="utf-8").splitlines()]
            if RUNS.exists()
            else []
        )
        mark = taken / "-".join(map(str, point))
        if list(point) in done or mark.exists():
            continue
        mark.touch()
        metrics = train([*keys(*point), "--forecast", "false", "--eval_strategy", "no"])
        result = {"point": point, **{name: metrics[name] for name in ("parameters", "train_tokens", "bits_per_byte")}}
        with open(RUNS, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def fit() -> None:
    """The law nearest to the runs: Huber loss of the logarithms (as in arXiv:2203.15556), from several starts."""
    import torch

    from hf_lm.planning.scaling import START, Law, matrices

    text = sum(len(row["text"].encode()) for row in documents()["train"])
    runs = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    per_token = {vocabulary: text / count for vocabulary, count in tokens_of_text().items()}
    rows = [
        (matrices(size, layers), vocabulary, batch * BLOCK, run["train_tokens"] * per_token[vocabulary])
        for run in runs
        for size, layers, vocabulary, batch, _ in [run["point"]]
    ]
    got = torch.tensor([run["bits_per_byte"] for run in runs], dtype=torch.double)
    size, vocab, batch, read = torch.tensor(rows, dtype=torch.double).log().T
    best = None
    for beta in (0.1, 0.17, 0.3):
        for at_start in (1000.0, 4000.0):
            start = torch.tensor([160.0, 1.2 * START**beta, beta, at_start, 0.74], dtype=torch.double)
            logs = start.log().requires_grad_()
            optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-14)

            def predicted(logs=logs):
                a, b, beta, at_start, growth = logs.exp()
                by_size = a * torch.exp(-ALPHA * size - DELTA * vocab)
                critical = at_start.log() + growth * (read - math.log(START))
                worth = read - torch.log1p((batch - critical).exp())
                return FLOOR + by_size + b * torch.exp(-beta * worth)

            def closure(logs=logs, optimizer=optimizer, predicted=predicted):
                optimizer.zero_grad()
                loss = torch.nn.functional.huber_loss(predicted().log(), got.log(), delta=0.01, reduction="sum")
                loss.backward()
                return loss

            optimizer.step(closure)
            loss = closure().item()
            if best is None or loss < best[0]:
                best = loss, logs.detach().exp().tolist(), (predicted() / got - 1).detach()
    _, values, errors = best
    size, *data = (float(f"{value:.4g}") for value in values)
    print(Law(FLOOR, size, ALPHA, DELTA, *data))
    print(
        f"{len(runs)} runs; off by {100 * errors.abs().mean():.2f}% on average, {100 * errors.abs().max():.2f}% at most"
    )


def documents() -> dict:
    """The recipe's text."""
    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.documents import load_documents

    return load_documents(DataArguments(train_file=str(RECIPE.parent / "data" / "*.parquet")))


def tokens_of_text() -> dict[int, int]:
    """With each vocabulary of the grid: the number of tokens of the training text."""
    from hf_lm.tokenization import train_tokenizer

    texts = [row["text"] for row in documents()["train"]]
    counts = {}
    for vocabulary in sorted({point[2] for point in GRID}):
        tokenizer = train_tokenizer(texts, vocab_size=vocabulary)
        counts[vocabulary] = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return counts


def check(budgets: list[float]) -> None:
    """Ask the plan, train what it says."""
    for seconds in budgets:
        command = [sys.executable, "-m", "hf_lm", "plan", str(RECIPE), "--budget", f"{seconds:g}s", "--json"]
        done = subprocess.run(command, check=True, cwd=RECIPE.parents[2], capture_output=True, text=True)
        choice = json.loads(done.stdout)
        metrics = train([*choice["overrides"]])
        said, got = choice["best"]["bits_per_byte"], metrics["bits_per_byte"]
        took = metrics["actual"]["trained_seconds"]
        result = {"budget": seconds, **choice["best"], "actual_seconds": took, "actual_bits_per_byte": got}
        result["error"] = said / got - 1
        print(json.dumps(result), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("sweep", "fit", "check"))
    parser.add_argument("seconds", type=float, nargs="*", help="budgets to check")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if arguments.what == "check":
        check(arguments.seconds or [60, 120, 300])
    else:
        {"sweep": sweep, "fit": fit}[arguments.what]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
