"""What a checkpoint must be to be trusted, which ones stay, what is refused."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, set_seed

from hf_lm import HfLmForCausalLM
from hf_lm.app.run import train
from hf_lm.data.collator import PackedCollator
from hf_lm.errors import InputError
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.training.arguments import HfLmTrainingArguments
from hf_lm.training.checkpoints import (
    UNCOMMITTED,
    checkpoint_to_resume,
    damage,
    newest_valid,
    require_complete,
    rotate,
)
from hf_lm.training.manifest import MANIFEST, commit, read_manifest
from hf_lm.training.trainer import HfLmTrainer


def checkpoint(run: Path, step: int, **facts) -> Path:
    """A committed folder with one file of each kind."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_bytes(os.urandom(1000))
    commit(folder, UNCOMMITTED, step=step, **{"progress": {}, "arguments": {}, **facts})
    return folder


def names(run: Path) -> list[str]:
    return sorted(folder.name for folder in run.iterdir())


def test_every_damage_is_found(tmp_path):
    for number, spoil in enumerate((
        lambda folder: (folder / "optimizer.pt").unlink(),
        lambda folder: (folder / "optimizer.pt").write_bytes(b""),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
    )):  # fmt: skip
        folder = checkpoint(tmp_path, number)
        assert damage(folder) is None
        spoil(folder)
        assert damage(folder) and damage(folder, contents=False)
    folder = checkpoint(tmp_path, 10)
    bytes_ = bytearray((folder / "model.safetensors").read_bytes())
    bytes_[500] ^= 1
    (folder / "model.safetensors").write_bytes(bytes_)
    assert "SHA-256" in damage(folder)
    said = []
    assert newest_valid(tmp_path, said.append) is None
    assert len(said) == 6 and all("renamed to _damaged-checkpoint-" in line for line in said)


def test_the_limit_counts_valid_checkpoints_and_never_takes_the_last_of_them(tmp_path):
    one, two, three = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    (three / "optimizer.pt").unlink()
    rotate(tmp_path, 1, [])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]  # of the valid ones the newest; the damaged one is kept
    assert newest_valid(tmp_path, lambda line: None) == two
    assert not one.exists()


def test_what_was_just_saved_and_the_best_stay(tmp_path):
    best, _, stale = (checkpoint(tmp_path, step) for step in (1, 2, 12))
    new = checkpoint(tmp_path, 3)  # a run that went on from checkpoint-2, not from checkpoint-12
    rotate(tmp_path, 1, [new, best])
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert not stale.exists()


def test_without_a_limit_all_stay(tmp_path):
    for limit in (None, 0, 5):
        for step in (1, 2, 3):
            if not (tmp_path / f"checkpoint-{step}").exists():
                checkpoint(tmp_path, step)
        rotate(tmp_path, limit, [])
        assert len(names(tmp_path)) == 3


def test_a_checkpoint_that_was_never_finished_goes_and_one_with_a_manifest_counts(tmp_path):
    whole, unfinished, late = (checkpoint(tmp_path, step) for step in (1, 2, 3))
    (unfinished / UNCOMMITTED).touch()
    (unfinished / MANIFEST).unlink()
    (late / UNCOMMITTED).touch()  # killed between the manifest and the mark's removal
    assert newest_valid(tmp_path) == late
    (late / MANIFEST).unlink()
    said = []
    assert newest_valid(tmp_path, said.append) == whole
    assert names(tmp_path) == ["checkpoint-1"] and not said


def test_manifests_of_the_first_version_are_read(tmp_path):
    folder = checkpoint(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest.pop("version") == 2
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert damage(folder) is None and read_manifest(folder)["step"] == 1


def test_a_manifest_has_the_keys_of_all_tasks(small_run):
    """As those of 0.1.0, which are compared with what a run has now."""
    kept = read_manifest(small_run[0] / "checkpoint-12")["arguments"]
    assert (kept["class_balance"], kept["language_pairs"], kept["replay_percentage"]) == ("none", None, 0.0)


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    before = (checkpoint(tmp_path, 1) / MANIFEST).read_text()
    after = (checkpoint(tmp_path, 1) / MANIFEST).read_text()
    assert before != after and damage(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("optimizer.pt", "the optimizer's state"),
        ("scheduler.pt", "the place in the learning-rate schedule"),
        ("rng_state.pth", "the random number generators' state"),
        ("progress", "the place in the data"),
    ],
)
def test_missing_state_is_refused_unless_told_to_start_it_anew(tmp_path, lost, said):
    folder = checkpoint(tmp_path, 1)
    if lost == "progress":
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest["progress"]
        (folder / MANIFEST).write_text(json.dumps(manifest))
    else:
        (folder / lost).unlink()
    with pytest.raises(InputError, match=f"lacks {said}.*--restart_missing_state"):
        require_complete(folder, {})
    lines = []
    require_complete(folder, {}, restart_missing_state=True, report=lines.append)
    assert len(lines) == 1 and said in lines[0] and "started anew" in lines[0]


@pytest.mark.parametrize(("lost", "said"), [("model.safetensors", "the weights"), ("trainer_state.json", "the step")])
def test_without_weights_or_step_nothing_goes_on(tmp_path, lost, said):
    folder = checkpoint(tmp_path, 1)
    (folder / lost).unlink()
    with pytest.raises(InputError, match=f"lacks {said}"):
        require_complete(folder, {}, allow_changes=True, restart_missing_state=True)


@pytest.mark.slow
def test_weights_alone_are_gone_on_from_by_choice(recipe, tmp_path, capsys):
    path = recipe(save_only_model=True, eval_strategy="no", report_to="none")
    train(*parse_recipe(path, ["--max_steps", "8"]))
    with pytest.raises(InputError, match=r"lacks the optimizer's state, the place in the learning-rate.*generators"):
        train(*parse_recipe(path, ["--resume", "--allow_changes"]))
    metrics = train(*parse_recipe(path, ["--resume", "--allow_changes", "--restart_missing_state"]))
    assert metrics["steps"] == 12
    assert "resumes with these started anew" in capsys.readouterr().err


@pytest.mark.slow
def test_other_data_and_another_model_are_refused(recipe, tmp_path):
    path = recipe(eval_strategy="no", report_to="none", max_steps=4)
    train(*parse_recipe(path, []))
    with pytest.raises(InputError, match="block_size 64 -> 32"):
        train(*parse_recipe(path, ["--resume", "--block_size", "32", "--max_steps", "4"]))
    book = tmp_path / "book.txt"
    book.write_text(book.read_text(encoding="utf-8")[:40_000], encoding="utf-8")
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "away")
    torch.manual_seed(0)
    train(*parse_recipe(path, ["--overwrite", "--max_steps", "8", "--save_steps", "4"]))
    for name in ("checkpoint-8",):
        (tmp_path / "run" / name).rename(tmp_path / f"away-{name}")
    book.write_text(book.read_text(encoding="utf-8")[:30_000], encoding="utf-8")
    with pytest.raises(InputError, match=r"was made with \d+ rows of training data, there are \d+ now"):
        train(*parse_recipe(path, ["--resume", "--max_steps", "8", "--save_steps", "4"]))


@pytest.mark.slow
def test_counts_go_on_over_a_resume(recipe, tmp_path):
    path = recipe(eval_strategy="no", report_to="none")
    straight = train(*parse_recipe(path, []))
    for name in ("checkpoint-12", "checkpoint-8"):
        (tmp_path / "run" / name).rename(tmp_path / f"away-{name}")
    resumed = train(*parse_recipe(path, ["--resume"]))
    assert resumed["train_tokens"] == straight["train_tokens"]
    assert resumed["train_seconds"] > 0 and resumed["divergences"] == 0
    finished = train(*parse_recipe(path, ["--resume"]))
    assert finished["train_tokens"] == straight["train_tokens"]


@pytest.fixture
def trainer(tiny_config, tmp_path):
    """`trainer(**arguments)` trains on 24 rows of 4 to 29 tokens: three epochs of six steps."""
    numbers = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 30, (24,), generator=numbers).tolist()
    ids = [torch.randint(10, 97, (length,), generator=numbers).tolist() for length in lengths]
    rows = {"input_ids": ids, "labels": ids, "position_ids": [list(range(length)) for length in lengths]}
    rows = Dataset.from_dict(rows)

    def make(**arguments) -> HfLmTrainer:
        options = {
            "output_dir": str(tmp_path / "run"), "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01,
            "save_steps": 8, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        }  # fmt: skip
        arguments = HfLmTrainingArguments(**{**options, **arguments})
        set_seed(arguments.seed)
        model = HfLmForCausalLM(tiny_config)
        return HfLmTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows.take(3), data_collator=PackedCollator(2))  # fmt: skip

    return make


@pytest.mark.parametrize("strategy", [pytest.param("random", marks=pytest.mark.slow), "group_by_length"])
def test_every_order_of_rows_is_found_again_in_a_later_epoch(trainer, tmp_path, strategy):
    straight = trainer(train_sampling_strategy=strategy)
    straight.train()
    for name in ("checkpoint-16", "checkpoint-18"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    torch.rand(5)
    resumed = trainer(train_sampling_strategy=strategy)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 18
    expected = straight.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())


def test_a_finished_run_is_trained_further_only_if_more_is_asked_for(trainer, capsys):
    straight = trainer()
    straight.train()
    resumed = trainer()
    assert resumed.train(resume_from_checkpoint=True).global_step == 18
    assert "checkpoint-18 has finished training" in capsys.readouterr().err
    expected = straight.model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.model.state_dict().items())
    assert trainer(num_train_epochs=4, allow_changes=True).train(resume_from_checkpoint=True).global_step == 24
    assert "has finished" not in capsys.readouterr().err


def test_a_checkpoint_that_is_named_is_checked_like_one_that_is_found(trainer, tmp_path):
    trainer().train()
    folder = tmp_path / "run" / "checkpoint-8"
    with pytest.raises(InputError, match="was made with other arguments: learning_rate 0.01 -> 0.1"):
        trainer(learning_rate=0.1).train(resume_from_checkpoint=str(folder))
    (folder / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="checkpoint-8 is damaged: optimizer.pt is missing"):
        trainer().train(resume_from_checkpoint=str(folder))
    with pytest.raises(InputError, match="checkpoint-9 is no checkpoint"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("name", "value"),
    [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0), ("dataloader_drop_last", True),
     ("lr_scheduler_kwargs", {"num_decay_steps": 2}), ("optim_args", "a=1"), ("seed", 1), ("max_grad_norm", 2.0)],
)  # fmt: skip
def test_arguments_that_decide_the_weights_cannot_change_unnoticed(trainer, tmp_path, name, value):
    trainer(max_steps=2).train()
    arguments = trainer(max_steps=2).args
    assert checkpoint_to_resume(arguments) == tmp_path / "run" / "checkpoint-2"
    setattr(arguments, name, value)
    with pytest.raises(InputError, match=f"was made with other arguments: {name} .* -> "):
        checkpoint_to_resume(arguments)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_best_step_without_a_checkpoint_costs_nothing(trainer, tmp_path, limit):
    """Evaluated more often than saved: upstream may not find the checkpoint of the best step."""
    run = trainer(
        max_steps=12, eval_strategy="steps", eval_steps=1, save_steps=4, load_best_model_at_end=True,
        save_total_limit=limit, learning_rate=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    assert run.state.best_global_step % 4
    assert names(tmp_path / "run") == [f"checkpoint-{step}" for step in ((12,) if limit == 1 else (12, 8))]


class Reader(TrainerCallback):
    """Reads each checkpoint as soon as it is saved, as wandb's and Ray's callbacks do; `seen` is what it found."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        assert folder == Path(get_last_checkpoint(args.output_dir)) and not (folder / UNCOMMITTED).exists()
        files = {path.name for path in folder.iterdir()}
        weights = HfLmForCausalLM.from_pretrained(folder).state_dict()
        own = kwargs["model"].state_dict()
        same = all(torch.equal(weights[name], weight) for name, weight in own.items())
        self.seen.append((state.global_step, damage(folder), {"optimizer.pt", "trainer_state.json"} <= files, same))


@pytest.mark.parametrize("strategy", ["steps", pytest.param("best", marks=pytest.mark.slow)])
def test_callbacks_find_the_whole_checkpoint_when_it_is_saved(trainer, strategy):
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    run, reader = trainer(max_steps=6, save_steps=2, save_strategy=strategy, save_total_limit=1, **evaluated), Reader()
    run.add_callback(reader)
    run.train()
    assert len(reader.seen) >= 2 and {found[1:] for found in reader.seen} == {(None, True, True)}


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_checkpoint_is_committed_ends_the_run_soon(trainer, tmp_path, monkeypatch):
    """At the next step: not after all those until the next save."""
    run, soft = (
        trainer(max_steps=100_000, save_steps=100, num_train_epochs=1),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )

    def without_room(*arguments, **facts):
        if facts["step"] == 200:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, soft[1]))
        try:
            commit(*arguments, **facts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)

    monkeypatch.setattr("hf_lm.training.checkpoints.commit", without_room)
    with pytest.raises(
        RuntimeError, match="checkpoint-200 could not be saved, those before are whole: .*File too large"
    ):
        run.train()
    assert run.state.global_step < 290
    assert names(tmp_path / "run") == ["checkpoint-100"] and damage(tmp_path / "run" / "checkpoint-100") is None
