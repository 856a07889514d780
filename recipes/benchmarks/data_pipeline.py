"""
How long it takes to turn documents into blocks of tokens, and how much memory, against the pipeline of the library's
language-modelling example (run_clm.py): a batched `map` that tokenises and one that concatenates and cuts.

    python recipes/benchmarks/data_pipeline.py state_of_the_union.parquet [--json]

Every run is a process of its own with an empty cache, in the order A B A B ...; time and memory are counted from the
loaded documents to the written blocks. The tokenizer (ours, of 8,192 tokens unless said otherwise) is the same for both
and is trained before. `second` is the time of the same call again, which finds its cache.

At the end, steps of `recipes/moby_dick` on that file: the share of the time in which a step waits for its batch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL = {"speed_ratio": 1.5, "second": 2.0, "waiting_share": 0.02}
KINDS = ("library", "hf_lm")


def library_blocks(documents, tokenizer, block_size: int):
    """What run_clm.py does: no eos, the tail dropped, documents run into each other."""

    def tokenize(examples: dict) -> dict:
        return tokenizer(examples["text"])

    def group_texts(examples: dict) -> dict:
        concatenated = {key: [item for row in rows for item in row] for key, rows in examples.items()}
        total = len(next(iter(concatenated.values()))) // block_size * block_size
        result = {
            key: [values[i : i + block_size] for i in range(0, total, block_size)]
            for key, values in concatenated.items()
        }
        result["labels"] = result["input_ids"].copy()
        return result

    return documents.map(tokenize, batched=True, remove_columns=documents.column_names).map(group_texts, batched=True)


def measure(kind: str, file: str, tokenizer_folder: str, block_size: int, cache: str) -> dict[str, float]:
    """Seconds, seconds the second time, peak memory (MB above the start) and tokens of one pipeline, in this process."""
    import datasets
    import psutil
    from transformers import AutoTokenizer

    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.documents import load_documents
    from hf_lm.data.packing import pack_documents

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    documents = load_documents(DataArguments(train_file=file, validation_split_percentage=0))["train"]
    pack = {"library": library_blocks, "hf_lm": pack_documents}[kind]
    tokenizer("warm up")
    with PeakMemory(psutil.Process()) as memory:
        start = time.perf_counter()
        blocks = pack(documents, tokenizer, block_size)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    pack(documents, tokenizer, block_size)
    second = time.perf_counter() - start
    tokens = sum(len(ids) for batch in blocks.iter(1000) for ids in batch["input_ids"])
    return {"seconds": seconds, "second": second, "peak_memory_mb": memory.peak / 2**20, "tokens": tokens}


class PeakMemory:
    """The most private memory (RSS less file-backed pages, which the system can drop) above that at the start."""

    def __init__(self, process):
        import threading

        self.process, self.peak = process, 0
        self.stop, self.thread = threading.Event(), threading.Thread(target=self._watch, daemon=True)

    def _private(self) -> int:
        memory = self.process.memory_info()
        return memory.rss - getattr(memory, "shared", 0)

    def _watch(self) -> None:
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self._private() - self.start)

    def __enter__(self) -> "PeakMemory":
        self.start = self._private()
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop.set()
        self.thread.join()


def run(kind: str, arguments: argparse.Namespace, tokenizer_folder: str) -> dict[str, float]:
    """`measure` in a new process with a new cache."""
    with tempfile.TemporaryDirectory() as cache:
        options = ["--block-size", str(arguments.block_size), "--measure", kind, tokenizer_folder, cache]
        done = subprocess.run(
            [sys.executable, __file__, arguments.file, *options], capture_output=True, text=True, env=None
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def waiting_share(file: str, steps: int = 300) -> float:
    """Of the time of so many training steps: in how much of it the next batch is not there yet."""
    from hf_lm.app.run import train
    from hf_lm.tasks.recipe import parse_recipe
    from hf_lm.training.trainer import HfLmTrainer

    waited, own = [], HfLmTrainer.get_batch_samples

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        batches = own(self, *args, **kwargs)
        waited.append((start, time.perf_counter()))
        return batches

    HfLmTrainer.get_batch_samples = get_batch_samples
    recipe = str(Path(__file__).parents[1] / "moby_dick" / "config.yaml")
    with tempfile.TemporaryDirectory() as folder:
        keys = {"train_file": file, "max_steps": steps, "output_dir": f"{folder}/run", "forecast": "false"}
        keys |= {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
        train(*parse_recipe(recipe, [word for key, value in keys.items() for word in (f"--{key}", str(value))]))
    first = 10  # the first steps warm up
    return sum(end - start for start, end in waited[first:]) / (waited[-1][1] - waited[first][0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", metavar="FILE", help="documents: .txt, .jsonl, .csv or .parquet")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a block (256)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens of the tokenizer (8192)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind (5)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, tokenizer_folder, cache = arguments.measure
        print(json.dumps(measure(kind, arguments.file, tokenizer_folder, arguments.block_size, cache)))
        return 0

    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.documents import load_documents
    from hf_lm.tokenization import train_tokenizer

    documents = load_documents(DataArguments(train_file=arguments.file, validation_split_percentage=0))["train"]
    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer((row["text"] for row in documents), arguments.vocab_size).save_pretrained(folder)
        for _ in range(arguments.repeats):
            for kind in KINDS:
                runs[kind].append(run(kind, arguments, folder))

    result = {
        kind: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for kind, rows in runs.items()
    }
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(runs["library"], runs["hf_lm"], strict=True)]
    result["speed_ratio"] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    result["waiting_share"] = waiting_share(arguments.file)
    result["goal"] = GOAL
    if arguments.json:
        print(json.dumps({**result, "runs": runs}))
        return 0
    print(f"{'':10}{'seconds':>10}{'again':>10}{'memory MB':>12}{'tokens':>12}")
    for kind in KINDS:
        row = result[kind]
        print(
            f"{kind:10}{row['seconds']:10.2f}{row['second']:10.2f}{row['peak_memory_mb']:12.0f}{row['tokens']:12,.0f}"
        )
    ratio = result["speed_ratio"]
    print(f"hf_lm is {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}) times as fast; goal 1.5")
    print(f"a training step waits for its batch in {result['waiting_share']:.2%} of the time; goal under 2%")
    return 0


if __name__ == "__main__":
    sys.exit(main())
