"""
How much faster is training with several examples in a block than with one example a row? See packing.md.

One example a row is padded to the longest beside it. The data, the model and the optimizer are those of
recipes/translation; with `--data chat` the conversations and the batch size are those of recipes/chat, and the model
is still the small one. Both sides see the same examples in each optimizer step; a step is forward, backward and
optimizer. The loss summed over all the examples is computed once, in float64: both sides learn the same.
"""

import time
from pathlib import Path

import harness

SIDES = ("padded", "packed")
RECIPE = Path(__file__).parents[1] / "translation" / "config.yaml"
CHAT = Path(__file__).parents[1] / "chat"


def prepare(rows: int, data: str):
    """A trainer of the recipe's model on the packed blocks of `rows` rows of a recipe's data."""
    from hf_lm.tasks import task_class
    from hf_lm.tasks.recipe import parse_recipe

    file = RECIPE.with_name("data") / "help_en_de_zh.parquet"
    overrides = ["--train_file", str(file), "--max_train_samples", str(rows), "--max_eval_samples", "8"]
    if data == "chat":
        overrides += ["--task", "chat", "--language_pairs", "null", "--split_column_name", "null"]
        for split in ("train", "validation"):
            overrides += [f"--{split}_file", str(CHAT / "data" / f"{split}.jsonl")]
        batch = parse_recipe(str(CHAT / "config.yaml"), [])[2].per_device_train_batch_size
        overrides += ["--per_device_train_batch_size", str(batch)]
    arguments = parse_recipe(str(RECIPE), [*overrides, "--report_to", "none", "--eval_strategy", "no"])
    task = task_class(arguments[1].task)(*arguments)
    return task.build_trainer(task.prepare())


def unpack(block: dict) -> list[dict]:
    """The examples of a block, each as a row of its own."""
    import numpy as np

    starts = np.flatnonzero(block["position_ids"] == 0)
    names = ("input_ids", "labels", "position_ids")
    parts = zip(*(np.split(block[name], starts[1:]) for name in names), strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def exact_loss(model, batches: list[dict]) -> float:
    """Negative log-likelihood of all learned tokens, in nats, computed in float64."""
    import torch

    total = 0.0
    for batch in batches:
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum").item()
    return total


def train(trainer, batches: list[dict]) -> float:
    """Seconds of an optimizer step on each of the batches."""
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


def measure(side: str, data: str, steps: int) -> dict[str, float]:
    """Examples a second, positions and examples a step, and the loss before training."""
    import numpy as np
    import torch

    from hf_lm.hardware import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    trainer = prepare(rows=1000, data=data)
    size = trainer.args.per_device_train_batch_size
    order = np.random.default_rng(0).permutation(len(trainer.train_dataset))[: size * steps]
    parts = [[trainer.train_dataset[int(number)] for number in part] for part in np.split(order, steps)]
    examples = sum(len(unpack(block)) for part in parts for block in part)
    if side == "padded":
        parts = [[row for block in part for row in unpack(block)] for part in parts]
    batches = [trainer.data_collator(part) for part in parts]

    model = trainer.model.double().eval()
    torch.manual_seed(0)
    for layer in model.model.layers:  # they start as the identity: other examples must be able to matter
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.02)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.02)
    with torch.no_grad():
        loss = exact_loss(model, batches)
    model.float().train()
    trainer.create_optimizer()
    train(trainer, batches[:1])  # warm up
    return {
        "examples_per_second": examples / train(trainer, batches),
        "examples_per_step": examples / steps,
        "positions_per_step": sum(batch["input_ids"].numel() for batch in batches) / steps,
        "loss": loss,
    }


def build_parser():
    parser = harness.build_parser(__doc__, rounds=4)
    parser.add_argument(
        "--data", choices=("translation", "chat"), default="translation", help="recipe of the examples"
    )
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a measurement (2)")
    return parser


def compare(bench: harness.Bench) -> int:
    options = bench.arguments
    bench.compare({"data": options.data, "steps": options.steps}, SIDES, recipe=RECIPE)
    return 0


if __name__ == "__main__":
    raise SystemExit(harness.main(build_parser(), measure, compare))
