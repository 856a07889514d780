"""
How fast do documents become blocks of tokens, against run_clm.py of transformers? See data_pipeline.md.

run_clm.py tokenizes in a batched `map` and concatenates and cuts in a second one. Time and memory are counted from the
loaded documents to the written blocks, in an empty cache; `again_seconds` is the time of the same call again, which
finds its cache. Both use the same tokenizer, ours, trained before. At the end, steps of `recipes/moby_dick` on that
file: the share of the time in which a step waits for its batch.
"""

import tempfile
import time
from pathlib import Path

import harness

SIDES = ("run_clm", "hf_lm")
RECIPE = Path(__file__).parents[1] / "moby_dick" / "config.yaml"


def pack_as_run_clm(documents, tokenizer, block_size: int):
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


def read_documents(file: str):
    from hf_lm.data.arguments import DataArguments
    from hf_lm.data.documents import load_documents

    return load_documents(DataArguments(train_file=file, validation_split_percentage=0))["train"]


def measure(side: str, path: str, **case) -> dict[str, float]:
    if side == "training":
        return {"waiting_share": waiting_share(path, case["steps"])}
    with tempfile.TemporaryDirectory() as cache:
        return measure_packing(side, path, case["tokenizer"], case["block_size"], cache)


def measure_packing(side: str, path: str, tokenizer: str, block_size: int, cache: str) -> dict[str, float]:
    """Seconds, seconds of the second call, peak memory and tokens of one pipeline."""
    import datasets
    from transformers import AutoTokenizer

    from hf_lm.data.packing import pack_documents

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    datasets.disable_progress_bars()
    loaded, documents = AutoTokenizer.from_pretrained(tokenizer), read_documents(path)
    pack = {"run_clm": pack_as_run_clm, "hf_lm": pack_documents}[side]
    loaded("warm up")
    with harness.PeakMemory() as memory:
        start = time.perf_counter()
        blocks = pack(documents, loaded, block_size)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    pack(documents, loaded, block_size)
    again = time.perf_counter() - start
    tokens = sum(len(ids) for batch in blocks.iter(1000) for ids in batch["input_ids"])
    return {
        "seconds": seconds,
        "again_seconds": again,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_mb": memory.peak_mb,
    }


def waiting_share(path: str, steps: int) -> float:
    """Share of the time of `steps` training steps in which the next batch is not there yet."""
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
    with tempfile.TemporaryDirectory() as folder:
        keys = {"train_file": path, "max_steps": steps, "output_dir": f"{folder}/run", "forecast": "false"}
        keys |= {"eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
        train(*parse_recipe(str(RECIPE), [word for key, value in keys.items() for word in (f"--{key}", str(value))]))
    first = min(10, steps // 2)  # the first steps warm up
    return sum(end - start for start, end in waited[first:]) / (waited[-1][1] - waited[first][0])


def build_parser():
    parser = harness.build_parser(__doc__, rounds=5)
    parser.add_argument("file", metavar="FILE", help="documents: .txt, .jsonl, .csv or .parquet")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a block (256)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens of the tokenizer (8192)")
    parser.add_argument("--steps", type=int, default=300, help="training steps that wait for batches (300)")
    return parser


def compare(bench: harness.Bench) -> int:
    from hf_lm.tokenization import train_tokenizer

    options, path = bench.arguments, str(Path(bench.arguments.file).resolve())
    case = {"file": Path(path).name, "block_size": options.block_size, "vocabulary": options.vocab_size}
    with tempfile.TemporaryDirectory() as folder:
        texts = (row["text"] for row in read_documents(path))
        train_tokenizer(texts, options.vocab_size).save_pretrained(folder)
        bench.compare(case, SIDES, private={"path": path, "tokenizer": folder})
    bench.compare(
        {"file": Path(path).name, "steps": options.steps}, ("training",), private={"path": path}, recipe=RECIPE
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
