"""
How long a save holds training up, against the stock trainer's: python recipes/benchmarks/checkpoint_saving.py [--json].

Both trainers save the same model and AdamW state, in the order A B A B ..., each into a folder of its own with the
checkpoint before deleted; before each save the disk is idle (`sync`). The medians are compared. Ours is then hashed
(SHA-256 of every file) and synced by a thread, beside training: `durable` is the time until the checkpoint is in its
place and would survive a power cut, with nothing else going on. The stock trainer's needs a `sync` for that.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.1
KINDS = ("stock", "hf_lm")


def build(kind: str, model, folder: Path):
    """A trainer whose optimizer has made one step."""
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.trainer import HfLmTrainer

    arguments_class, trainer_class = {
        "stock": (TrainingArguments, Trainer),
        "hf_lm": (HfLmTrainingArguments, HfLmTrainer),
    }[kind]
    arguments = arguments_class(
        output_dir=str(folder), max_steps=1000, save_total_limit=1, lr_scheduler_type="linear", report_to="none", bf16=False
    )  # fmt: skip
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows)
    trainer.create_optimizer_and_scheduler(1000)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer._clock = time.perf_counter()
    return trainer


def save(trainer) -> dict[str, float]:
    """Seconds that a save takes, and until it is on the disk."""
    os.sync()
    trainer.state.global_step += 1
    start = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    seconds = time.perf_counter() - start
    getattr(trainer, "_finish_saving", os.sync)()
    return {"seconds": seconds, "durable": time.perf_counter() - start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden-size", type=int, default=512, help="of a model of 8 layers (512: 30M parameters)")
    parser.add_argument("--repeats", type=int, default=9, help="saves of each kind (9)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()

    from transformers.utils import logging

    from hf_lm import HfLmConfig, HfLmForCausalLM

    logging.disable_progress_bar()
    size = arguments.hidden_size
    model = HfLmForCausalLM(
        HfLmConfig(vocab_size=16_384, hidden_size=size, num_hidden_layers=8, num_attention_heads=size // 64)
    )
    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {kind: build(kind, model, Path(folder) / kind) for kind in KINDS}
        for repeat in range(arguments.repeats + 1):
            for kind, trainer in trainers.items():
                result = save(trainer)
                if repeat:  # the first one of each kind warms up
                    runs[kind].append(result)
        written = sum(path.stat().st_size for path in (Path(folder) / "hf_lm").rglob("*") if path.is_file())
    result = {
        kind: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for kind, rows in runs.items()
    }
    ratios = {key: result["hf_lm"][key] / result["stock"][key] for key in result["stock"]}
    result |= {"ratios": ratios, "limit": LIMIT, "parameters": model.num_parameters(), "bytes": written}
    if arguments.json:
        print(json.dumps({**result, "runs": runs}))
    else:
        print(f"{model.num_parameters():,} parameters, a checkpoint of {written / 2**20:,.0f} MB")
        for key, ratio in ratios.items():
            ours, stock = (result[kind][key] for kind in reversed(KINDS))
            print(f"{key}: hf_lm {ours:.2f}, stock {stock:.2f}, ratio {ratio:.2f}")
        print(f"goal: seconds at most {LIMIT} of the stock trainer's")
    return int(ratios["seconds"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
