"""
Which bits per byte do a model's size and its training lead to? See scaling.md.

    sweep    train the grid below
    fit      print the constants of the law in hf_lm/planning/scaling.py, which `hf-lm plan CONFIG.yaml --budget` uses
    check    train what the plan chooses for some budgets

The sweep is that of `recipes/addresses` with other sizes and steps, each run to the end of its own learning-rate
schedule. It counts tokens, not time: it may run beside other work. `check` needs the machine for itself.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import harness

RECIPE = Path(__file__).parents[1] / "addresses" / "config.yaml"
BLOCK = 128
# What a size can reach at best does not depend on how it is trained: from 28 runs of the recipe before
# 2026-11-26, of up to 6.3 million parameters. Runs as few and as small as those below do not tell.
FLOOR, ALPHA, DELTA = 0.6756, 0.3959, 0.1847
POINT = ("hidden_size", "layers", "vocabulary", "batch", "tokens")
GRID = [  # in the order of POINT
    (128, 6, 4096, 32, 2_834_432),  # the recipe itself
    *((size, layers, 2048, 8, 200_000) for size, layers in ((64, 4), (128, 6), (192, 6))),
    *((128, 6, vocabulary, 8, 200_000) for vocabulary in (1024, 4096)),
    (64, 4, 2048, 32, 200_000), (128, 6, 2048, 32, 200_000), (64, 4, 4096, 16, 400_000),
    *((size, layers, 2048, 8, 600_000) for size, layers in ((64, 4), (128, 6))), (128, 6, 4096, 8, 600_000),
    (64, 4, 4096, 32, 600_000), (128, 6, 2048, 32, 600_000), (96, 5, 4096, 32, 800_000),
    (64, 4, 2048, 8, 1_600_000),
]  # fmt: skip


def measure(side: str, **case) -> dict[str, float]:
    """Train one point of the grid (`sweep`), or what the plan chooses for a budget (`check`)."""
    if side == "check":
        return check_budget(case["budget"])
    import yaml

    from hf_lm.planning.scaling import as_overrides

    fields = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["config_overrides"]
    keys = {
        "config_overrides": as_overrides(fields, case["hidden_size"], case["layers"]),
        "vocab_size": case["vocabulary"],
        "per_device_train_batch_size": case["batch"],
        "max_steps": round(case["tokens"] / (case["batch"] * BLOCK)),
        "forecast": False,
        "eval_strategy": "no",
    }
    metrics = harness.train_recipe(RECIPE, keys)
    return {name: metrics[name] for name in ("parameters", "train_tokens", "bits_per_byte")}


def check_budget(budget: float) -> dict[str, float]:
    """Ask the plan, train what it chooses."""
    command = [sys.executable, "-m", "hf_lm", "plan", str(RECIPE), "--budget", f"{budget:g}s", "--json"]
    done = subprocess.run(command, cwd=harness.REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    choice = json.loads(done.stdout)
    metrics = harness.train_recipe(RECIPE, {}, choice["overrides"])
    predicted, measured = choice["best"].pop("bits_per_byte"), metrics["bits_per_byte"]
    return {
        **choice["best"],
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "off": abs(predicted / measured - 1),
        "trained_seconds": metrics["actual"]["trained_seconds"],
    }


def fit() -> None:
    """The law nearest to the runs: Huber loss of the logarithms (as in arXiv:2203.15556), from several starts."""
    import torch

    from hf_lm.planning.scaling import START, Law, matrices

    records = harness.read_records(sorted(harness.RECORDS.glob("scaling.*.jsonl")))
    records = [record for record in records if {*POINT} == {*record["case"]}]
    text = sum(len(row["text"].encode()) for row in documents()["train"])
    per_token = {vocabulary: text / count for vocabulary, count in tokens_of_text().items()}
    rows = [
        (matrices(size, layers), words, batch * BLOCK, record["numbers"]["train_tokens"] * per_token[words])
        for record in records
        for size, layers, words, batch, _ in [[record["case"][name] for name in POINT]]
    ]
    got = torch.tensor([record["numbers"]["bits_per_byte"] for record in records], dtype=torch.double)
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
                best = loss, logs.detach().exp().tolist(), (predicted() / got - 1).detach().abs()
    _, values, errors = best
    size, *data = (float(f"{value:.4g}") for value in values)
    print(Law(FLOOR, size, ALPHA, DELTA, *data))
    print(f"{len(records)} runs; off by {errors.mean():.2%} on average, {errors.max():.2%} at most")


def documents() -> dict:
    """The recipe's text."""
    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.documents import load_documents

    return load_documents(DataArguments(train_file=str(RECIPE.parent / "data" / "*.parquet")))


def tokens_of_text() -> dict[int, int]:
    """The number of tokens of the training text, for each vocabulary of the grid."""
    from hf_lm.tokenization import train_tokenizer

    texts = [row["text"] for row in documents()["train"]]
    counts = {}
    for vocabulary in sorted({point[2] for point in GRID}):
        tokenizer = train_tokenizer(texts, vocab_size=vocabulary)
        counts[vocabulary] = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return counts


def build_parser():
    parser = harness.build_parser(__doc__)
    parser.add_argument("what", choices=("sweep", "fit", "check"), help="see above")
    parser.add_argument("seconds", type=float, nargs="*", default=[60, 120, 300], help="budgets to check (60 120 300)")
    parser.add_argument("--points", type=int, default=len(GRID), help="of the grid, the smallest first (all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs of the sweep at once, with a thread each (1)")
    return parser


def compare(bench: harness.Bench) -> int:
    options = bench.arguments
    if options.what == "fit":
        fit()
        return 0
    if options.what == "sweep":
        points = sorted(GRID, key=lambda point: (point[4], point[0]))[: options.points]
        cases = [dict(zip(POINT, point, strict=True)) for point in points]
    else:
        cases = [{"budget": seconds} for seconds in options.seconds]
    threads = 1 if options.jobs > 1 else 0
    jobs = options.jobs if options.what == "sweep" else 1
    for record in bench.run_all(cases, side=lambda case: options.what, jobs=jobs, threads=threads, recipe=RECIPE):
        print(record["case"], record["numbers"])
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
