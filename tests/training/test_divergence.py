"""Losses and gradients that are no longer numbers: what is said, what is kept, how a run goes on."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from hf_lm import HfLmForCausalLM
from hf_lm.data.collator import PackedCollator
from hf_lm.errors import InputError
from hf_lm.training.arguments import HfLmTrainingArguments
from hf_lm.training.checkpoints import damage
from hf_lm.training.trainer import HfLmTrainer, TrainingDiverged

POISON = 7  # the token of the row that makes the loss NaN


class Poisoned(HfLmForCausalLM):
    """A model whose loss is `poison` on batches that hold a row of `POISON` alone."""

    poison = math.nan

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if self.training and (input_ids == POISON).all(dim=1).any():
            output.loss = output.loss * self.poison
        return output


def rows(count: int, poisoned: tuple[int, ...]) -> Dataset:
    numbers = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, 97, (12,), generator=numbers).tolist() for _ in range(count)]
    for row in poisoned:
        ids[row] = [POISON] * 12
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": [list(range(12))] * count})


@pytest.fixture
def build(tiny_config, tmp_path):
    """`build(poisoned_rows, **arguments)` is a trainer that meets these rows, two a batch, in order."""

    def make(poisoned: tuple[int, ...] = (), **arguments) -> HfLmTrainer:
        options = {
            "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "max_steps": 12, "save_steps": 2,
            "learning_rate": 0.01, "muon_learning_rate": 0.02, "warmup_steps": 0, "logging_steps": 1, "bf16": False,
            "report_to": "none", "disable_tqdm": True, "train_sampling_strategy": "sequential", "seed": 1,
            "remove_unused_columns": False,
        }  # fmt: skip
        arguments = HfLmTrainingArguments(**{**options, **arguments})
        torch.manual_seed(0)
        model = Poisoned(tiny_config)
        return HfLmTrainer(model=model, args=arguments, train_dataset=rows(48, poisoned), data_collator=PackedCollator(2))  # fmt: skip

    return make


def logged(trainer: HfLmTrainer, key: str) -> dict[int, float]:
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def left_out(trainer: HfLmTrainer) -> list[int]:
    """The steps without a logged loss, if the log counts as many divergences."""
    losses, counts = logged(trainer, "loss"), logged(trainer, "divergences")
    steps = [step for step in range(1, trainer.state.global_step + 1) if step not in losses]
    assert list(counts.values()) == [sum(left < step for left in steps) for step in counts]
    assert trainer.progress.divergences == len(steps)
    return steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_nan_stops_at_its_step_and_says_what_was_seen(build, tmp_path, accumulation):
    trainer = build((10,), gradient_accumulation_steps=accumulation)
    with pytest.raises(TrainingDiverged) as stop:
        trainer.train()
    step = 6 if accumulation == 1 else 3
    text = str(stop.value)
    assert text.startswith(
        f"the loss is nan at step {step}. loss nan; gradient norm nan in group 0 (Muon, weight_decay"
    )
    assert ("rows 10, 11" if accumulation == 1 else "rows 8, 9, 10, 11") in text
    assert "first not finite in model." in text
    saved = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [folder.name for folder in saved] == ([f"checkpoint-{n}" for n in (2, 4)] if accumulation == 1 else ["checkpoint-2"])  # fmt: skip
    assert not any(damage(folder) for folder in saved)


@pytest.mark.parametrize("strategy", [pytest.param("random", marks=pytest.mark.slow), "group_by_length"])
def test_rows_that_are_named_are_those_of_the_batch_in_any_order(build, caplog, strategy):
    trainer = build((10,), on_divergence="skip", train_sampling_strategy=strategy, max_steps=48)
    said, leave_out = [], trainer.leave_out
    trainer.leave_out = lambda model, what: (said.append(what), leave_out(model, what))
    trainer.train()
    rows = [re.search(r"rows ([\d, ]+)", text)[1].split(", ") for text in said]
    assert len(rows) == 2 and all("10" in batch for batch in rows)  # once in each epoch


def test_an_infinite_gradient_is_seen_where_it_is_before_clipping_spreads_it(build):
    trainer = build()
    weight = trainer.model.model.layers[1].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingDiverged) as stop:
        trainer.train()
    text = str(stop.value)
    assert text.startswith("the gradient norm is ")
    assert "first not finite in model.layers.1.mlp.up_proj.weight" in text
    group_1 = text.split(" in group 1")[0].split(", ")[-1].split()[-1]
    assert math.isfinite(float(group_1))  # AdamW's group has none of it


def test_skipping_leaves_weights_and_optimizer_as_if_the_batch_had_not_been(build):
    trainer = build((10, 30), on_divergence="skip", gradient_accumulation_steps=1, max_steps=24)
    before = {}

    original = trainer.leave_out

    def noted(model, what):
        before[trainer.state.global_step + 1] = {name: weight.clone() for name, weight in model.state_dict().items()}
        original(model, what)

    trainer.leave_out = noted
    step_end = trainer.callback_handler.on_step_end
    unchanged = []

    def compare(args, state, control):
        if state.global_step in before:
            now = trainer.model.state_dict()
            unchanged.append(all(torch.equal(now[name], was) for name, was in before[state.global_step].items()))
        return step_end(args, state, control)

    trainer.callback_handler.on_step_end = compare
    trainer.train()
    assert sorted(before) == [6, 16] and unchanged == [True, True]
    assert left_out(trainer) == [6, 16]
    assert all(math.isfinite(loss) and loss > 0 for loss in logged(trainer, "loss").values())
    assert all(weight.isfinite().all() for weight in trainer.model.state_dict().values())


def test_a_scaler_of_gradients_skips_the_update_too(build):
    """As in float16, where it checks each update before it makes it."""
    trainer = build((10,), on_divergence="skip", save_strategy="no", optim="adamw_torch")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    trainer.train()
    assert left_out(trainer) == [6] and trainer.accelerator.scaler.get_scale() < 16.0
    assert all(weight.isfinite().all() for weight in trainer.model.state_dict().values())


def test_more_divergences_than_allowed_stop_the_run(build):
    trainer = build((4, 10, 20), on_divergence="skip", max_divergences=2)
    with pytest.raises(TrainingDiverged, match=r"at step 11.*More than max_divergences \(2\)"):
        trainer.train()


def test_rolling_back_takes_the_last_checkpoint_and_goes_on_with_the_next_batch(build, tmp_path):
    trainer = build((15,), on_divergence="rollback", save_steps=3)
    taken = {}
    roll_back = trainer.roll_back

    def noted(what):
        text = roll_back(what)
        taken.update({name: weight.clone() for name, weight in trainer.model.state_dict().items()})
        taken["lr"] = trainer.lr_scheduler.get_last_lr()[0]
        taken["text"] = text
        return text

    trainer.roll_back = noted
    trainer.train()
    assert taken["text"] == "rolled back to checkpoint-6"
    saved = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(taken[name], weight) for name, weight in saved.items())
    straight = build(output_dir=str(tmp_path / "straight"))
    straight.train()
    assert logged(trainer, "learning_rate").items() <= logged(straight, "learning_rate").items()
    assert trainer.state.global_step == 12 and left_out(trainer) == [8]


def test_rolling_back_needs_a_checkpoint(build):
    with pytest.raises(TrainingDiverged, match="no checkpoint yet"):
        build((2,), on_divergence="rollback").train()


@pytest.mark.parametrize("action", ["skip", pytest.param("rollback", marks=pytest.mark.slow)])
def test_a_run_that_diverged_resumes_to_the_same_bits_and_count(build, tmp_path, action):
    straight = build((10, 18), on_divergence=action)
    straight.train()
    resumed = build((10, 18), on_divergence=action, output_dir=str(tmp_path / "resumed"), max_steps=12)
    resumed.args.save_steps = 2
    stop = resumed.callback_handler.on_step_end

    def interrupted(args, state, control):
        control = stop(args, state, control)
        if state.global_step == 7:
            raise KeyboardInterrupt
        return control

    resumed.callback_handler.on_step_end = interrupted
    with pytest.raises(KeyboardInterrupt):
        resumed.train()
    again = build((10, 18), on_divergence=action, output_dir=str(tmp_path / "resumed"))
    again.train(resume_from_checkpoint=True)
    assert again.progress.divergences == straight.progress.divergences == 2
    mine, theirs = again.model.state_dict(), straight.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_spike_is_a_divergence_by_choice(build):
    trainer = build((30,), max_steps=24, on_divergence="skip", spike_factor=3.0)
    trainer.model.poison = 5.0
    trainer.train()
    assert left_out(trainer) == [16]
    trainer = build((30,), max_steps=24, on_divergence="skip")
    trainer.model.poison = 5.0
    trainer.train()
    assert left_out(trainer) == []


def test_weights_that_are_not_finite_are_never_saved(build, tmp_path):
    trainer = build(save_steps=1)
    trainer.callback_handler.on_step_end, end = None, trainer.callback_handler.on_step_end

    def spoil(args, state, control):
        if state.global_step == 2:
            trainer.model.model.norm.weight.data[0] = math.nan
        return end(args, state, control)

    trainer.callback_handler.on_step_end = spoil
    with pytest.raises(TrainingDiverged, match="not finite at step 2: checkpoint-2 is not saved"):
        trainer.train()
    assert [folder.name for folder in (tmp_path / "run").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("key", "value"), [("on_divergence", "ignore"), ("spike_factor", 0.5), ("muon_momentum", 1.0)]
)
def test_choices_are_checked(build, key, value):
    with pytest.raises(InputError, match=f"{key}: must be .*{value}"):
        build(**{key: value})


TWO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from pathlib import Path
import hf_lm
from hf_lm import HfLmConfig
import test_divergence as t
config = HfLmConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2)
folder = Path(sys.argv[2])
for action in ("skip", "rollback", "stop"):
    trainer = t.build.__wrapped__(config, folder / action)((10,), per_device_train_batch_size=1, on_divergence=action)
    lines = []
    try:
        trainer.train()
    except t.TrainingDiverged as stop:
        lines.append(f"{action}: {stop}")
    total = sum(weight.double().sum().item() for weight in trainer.model.state_dict().values())
    lines.append(f"{action}: {trainer.progress.divergences} {total!r}")
    with open(folder / f"rank {trainer.args.process_index}", "a") as file:
        file.writelines(line + "\\n" for line in lines)
"""


@pytest.mark.slow
def test_two_processes_decide_alike(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.replace("t.build.__wrapped__", "t.build._get_wrapped_function()"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    command += [str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    by_rank = [(tmp_path / f"rank {rank}").read_text().splitlines() for rank in (0, 1)]
    assert by_rank[0] == by_rank[1] and len(by_rank[0]) == 4
    (said,) = [line for line in by_rank[0] if "the loss is nan" in line]
    assert "process 0: loss nan" in said and "process 1" not in said  # it had row 10
    assert "rows 10." in said
    for action in ("skip", "rollback"):
        history = json.loads((tmp_path / action / "run" / "checkpoint-12" / "trainer_state.json").read_text())
        assert [entry["step"] for entry in history["log_history"] if "divergences" in entry] == [7, 8, 9, 10, 11, 12]
