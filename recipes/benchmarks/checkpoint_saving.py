"""
How long does a save hold training up, against the Trainer of transformers? See checkpoint_saving.md.

Both trainers save the same model and AdamW state into a folder of their own, with the checkpoint before deleted; the
disk is idle (`sync`) before each save. Ours is then hashed (SHA-256 of every file) and synced by a thread beside
training: `durable_seconds` is the time until the checkpoint is committed and would survive a power cut, with nothing
else running. The stock trainer's needs a `sync` for that.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import harness

SIDES = ("transformers", "hf_lm")
LIMIT = 1.1


def build_trainer(side: str, model, folder: str):
    """A trainer whose optimizer has made one step."""
    import torch
    from transformers import Trainer, TrainingArguments

    from hf_lm.training.arguments import HfLmTrainingArguments
    from hf_lm.training.trainer import HfLmTrainer

    arguments_class, trainer_class = {
        "transformers": (TrainingArguments, Trainer),
        "hf_lm": (HfLmTrainingArguments, HfLmTrainer),
    }[side]
    arguments = arguments_class(
        output_dir=folder, max_steps=1000, save_total_limit=1, lr_scheduler_type="linear", report_to="none", bf16=False
    )
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}]
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows)
    trainer.create_optimizer_and_scheduler(1000)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return trainer


def save(trainer) -> tuple[float, float]:
    """Seconds that training waits for a save, and seconds until it is on the disk."""
    os.sync()
    trainer.state.global_step += 1
    start = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    seconds = time.perf_counter() - start
    if hasattr(trainer, "commits"):
        trainer.commits.wait()
    else:
        os.sync()
    return seconds, time.perf_counter() - start


def measure(side: str, hidden_size: int, saves: int) -> dict[str, float]:
    """Medians over the saves of one trainer, after a first one that is not counted."""
    from transformers.utils import logging

    from hf_lm import HfLmConfig, HfLmForCausalLM

    logging.disable_progress_bar()
    shape = {"hidden_size": hidden_size, "num_hidden_layers": 8, "num_attention_heads": hidden_size // 64}
    model = HfLmForCausalLM(HfLmConfig(vocab_size=16_384, **shape))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(side, model, folder)
        times = [save(trainer) for _ in range(saves + 1)][1:]
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    seconds, durable = zip(*times, strict=True)
    return {
        "seconds": statistics.median(seconds),
        "durable_seconds": statistics.median(durable),
        "checkpoint_mb": written / 2**20,
        "parameters": model.num_parameters(),
    }


def build_parser():
    parser = harness.build_parser(__doc__)
    parser.add_argument("--hidden-size", type=int, default=512, help="of a model of 8 layers (512: 34M parameters)")
    parser.add_argument("--saves", type=int, default=3, help="saves per measurement (3)")
    return parser


def compare(bench: harness.Bench) -> int:
    case = {"hidden_size": bench.arguments.hidden_size, "saves": bench.arguments.saves}
    record = bench.compare(case, SIDES)
    return int(record["numbers"]["ratio"]["hf_lm"]["seconds"]["median"] > LIMIT)


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
