"""
How much faster training is with several examples in a block than with one example a row, padded to the longest beside
it, and that both learn the same.

    python recipes/benchmarks/packing.py [--data chat] [--json]

The data, the model and the optimizer are those of recipes/translation; with `--data chat` the conversations and the batch
size are those of recipes/chat, and the model is still the small one. Both kinds see exactly the same examples in each
optimizer step, in one process, in the order A B A B ...; a step is forward, backward and optimizer. Before that, the
loss summed over all the examples is computed once for each kind, in float64.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

RECIPE = Path(__file__).parents[1] / "translation" / "config.yaml"
CHAT = Path(__file__).parents[1] / "chat"
GOAL = 2.5


def prepare(rows: int, data_name: str):
    """A trainer of the recipe's model on the packed blocks of so many rows of the data of a recipe."""
    from hf_lm.tasks import task_class
    from hf_lm.tasks.recipe import parse_recipe

    data = RECIPE.with_name("data") / "help_en_de_zh.parquet"
    overrides = ["--train_file", str(data), "--max_train_samples", str(rows), "--max_eval_samples", "8"]
    if data_name == "chat":
        overrides += ["--task", "chat", "--language_pairs", "null", "--split_column_name", "null"]
        for split in ("train", "validation"):
            overrides += [f"--{split}_file", str(CHAT / "data" / f"{split}.jsonl")]
        batch = parse_recipe(str(CHAT / "config.yaml"), [])[2].per_device_train_batch_size
        overrides += ["--per_device_train_batch_size", str(batch)]
    arguments = parse_recipe(str(RECIPE), [*overrides, "--report_to", "none", "--eval_strategy", "no"])
    task = task_class(arguments[1].task)(*arguments)
    return task.build_trainer(None)


def unpack(block: dict) -> list[dict]:
    """The examples of a block, each as a row of its own."""
    starts = np.flatnonzero(block["position_ids"] == 0)
    names = ("input_ids", "labels", "position_ids")
    parts = zip(*(np.split(block[name], starts[1:]) for name in names), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def exact_loss(model, batches: list[dict]) -> float:
    """Negative log-likelihood of all learned tokens, in nats, computed in float64."""
    total = 0.0
    for batch in batches:
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum").item()
    return total


def seconds(trainer, batches: list[dict]) -> float:
    """Time of an optimizer step on each of the batches."""
    model, optimizer = trainer.model, trainer.optimizer
    start = time.perf_counter()
    for batch in batches:
        with trainer.compute_loss_context_manager():
            count = (batch["labels"] != -100).sum()
            loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", choices=("translation", "chat"), default="translation", help="recipe of the examples"
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each kind in a round (2)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of both kinds (4)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()

    from hf_lm.hardware import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    trainer = prepare(rows=1000, data_name=arguments.data)
    size = trainer.args.per_device_train_batch_size
    order = np.random.default_rng(0).permutation(len(trainer.train_dataset))[: size * arguments.steps]
    blocks = [[trainer.train_dataset[int(number)] for number in part] for part in np.split(order, arguments.steps)]
    collate = trainer.data_collator
    packed = [collate(part) for part in blocks]
    padded = [collate([row for block in part for row in unpack(block)]) for part in blocks]
    examples = sum(len(batch["input_ids"]) for batch in padded)

    model = trainer.model.double().eval()
    for layer in model.model.layers:  # they start as the identity: other examples must be able to matter
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.02)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.02)
    with torch.no_grad():
        losses = {"packed": exact_loss(model, packed), "padded": exact_loss(model, padded)}

    model.float().train()
    trainer.create_optimizer()
    runs: dict[str, list[float]] = {"padded": [], "packed": []}
    seconds(trainer, packed[:1])  # warm up
    for _ in range(arguments.rounds):
        for kind, batches in (("padded", padded), ("packed", packed)):
            runs[kind].append(examples / seconds(trainer, batches))
    ratios = [fast / slow for fast, slow in zip(runs["packed"], runs["padded"], strict=True)]
    result = {
        "examples_per_step": examples / arguments.steps,
        "examples_per_second": {kind: statistics.median(values) for kind, values in runs.items()},
        "positions_per_step": {
            kind: sum(batch["input_ids"].numel() for batch in batches) / arguments.steps
            for kind, batches in (("padded", padded), ("packed", packed))
        },
        "loss": losses,
        "relative_difference": abs(losses["packed"] / losses["padded"] - 1),
        "speed_ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "goal": GOAL,
    }
    if arguments.json:
        print(json.dumps({**result, "runs": runs}))
        return 0
    print(f"{'':10}{'examples/s':>12}{'positions a step':>18}{'loss in nats':>24}")
    for kind in runs:
        speed, positions = (result[name][kind] for name in ("examples_per_second", "positions_per_step"))
        print(f"{kind:10}{speed:12.1f}{positions:18,.0f}{losses[kind]:24.10f}")
    ratio = result["speed_ratio"]
    print(
        f"packed is {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}) times as fast; goal {GOAL}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
