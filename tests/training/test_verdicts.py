"""Arguments of `transformers.TrainingArguments` in a recipe: each works, or is refused in one line."""

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments
from transformers.trainer_utils import set_seed

from hf_lm import HfLmForCausalLM
from hf_lm.app.run import check_output_dir, train
from hf_lm.data.collator import PackedCollator
from hf_lm.errors import InputError
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.training.arguments import HfLmTrainingArguments
from hf_lm.training.checkpoints import decisive
from hf_lm.training.trainer import HfLmTrainer
from hf_lm.training.verdicts import VERDICTS

WORK = {name for name, reason in VERDICTS.items() if reason is None}
# Arguments that decide the weights, with a value under which they come out otherwise (beside other arguments).
CHANGE = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "num_train_epochs": {"num_train_epochs": 2, "max_steps": -1},
    "max_steps": {"max_steps": 3},
    "learning_rate": {"learning_rate": 0.02},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"num_decay_steps": 1}},
    "warmup_steps": {"warmup_steps": 2},
    "optim": {"optim": "adafactor"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 0.1},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "bf16": {"bf16": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "seed": {"seed": 1},
    "data_seed": {"data_seed": 7},
    "dataloader_drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 7},
    "train_sampling_strategy": {"train_sampling_strategy": "group_by_length"},
    "load_best_model_at_end": {
        "load_best_model_at_end": True, "learning_rate": 1.0, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1,
    },
}  # fmt: skip
BESIDE_OTHERS = {"lr_scheduler_kwargs", "optim_args", "dataloader_drop_last", "load_best_model_at_end"}
# Arguments that decide how a run goes, not what comes out.
KEEP = {
    "output_dir": {"output_dir": "elsewhere"},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},
    "activation_checkpointing": {"activation_checkpointing": True},
    "activation_checkpointing_kwargs": {
        "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
    },
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "logging_strategy": {"logging_strategy": "epoch"},
    "logging_steps": {"logging_steps": 0.5},
    "logging_first_step": {"logging_first_step": True},
    "log_on_each_node": {"log_on_each_node": False},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": True},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "log_level": {"log_level": "error"},
    "log_level_replica": {"log_level_replica": "error"},
    "disable_tqdm": {"disable_tqdm": False},
    "report_to": {"report_to": ["tensorboard"]},
    "run_name": {"report_to": "tensorboard", "run_name": "named"},
    "eval_strategy": {"eval_strategy": "epoch"},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 0.5},
    "eval_delay": {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 1},
    "eval_on_start": {"eval_on_start": True},
    "eval_accumulation_steps": {"eval_strategy": "steps", "eval_steps": 2, "eval_accumulation_steps": 1},
    "save_only_model": {"save_strategy": "steps", "save_steps": 2, "save_only_model": True},
    "save_strategy": {"save_strategy": "epoch"},
    "save_steps": {"save_strategy": "steps", "save_steps": 0.5},
    "save_on_each_node": {"save_strategy": "steps", "save_on_each_node": True},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
    "metric_for_best_model": {
        "save_strategy": "best", "metric_for_best_model": "perplexity", "eval_strategy": "steps", "eval_steps": 2,
    },
    "greater_is_better": {
        "save_strategy": "best", "metric_for_best_model": "tokens", "greater_is_better": True, "eval_strategy": "epoch",
    },
    "full_determinism": {"full_determinism": True},
    "use_cpu": {"use_cpu": True},
    "dataloader_num_workers": {"dataloader_num_workers": 1},
    "dataloader_pin_memory": {"dataloader_pin_memory": False},
    "dataloader_persistent_workers": {"dataloader_persistent_workers": True, "dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_prefetch_factor": 3, "dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_multiprocessing_context": "fork", "dataloader_num_workers": 1},
    "do_train": {"do_train": True},
    "do_eval": {"do_eval": True},
    "local_rank": {"local_rank": 0},
}  # fmt: skip
# Tried elsewhere: test_processes.py, test_sharded.py, test_push.py, test_run.py, test_gpu.py, test_loss.py; or handed to
# a tracker, a launcher or the GPU as they are.
ELSEWHERE = {
    "label_smoothing_factor", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp",
    "fsdp_config", "deepspeed", "resume_from_checkpoint",
}  # fmt: skip


def test_every_argument_has_a_verdict_and_every_one_that_works_is_tried():
    """A new release of transformers that adds an argument fails here."""
    assert {field.name for field in fields(TrainingArguments) if field.init} <= set(VERDICTS)
    assert set(CHANGE) | set(KEEP) | ELSEWHERE == WORK
    assert len(WORK) == len(CHANGE) + len(KEEP) + len(ELSEWHERE)


@pytest.fixture
def run(tiny_config, tmp_path, monkeypatch):
    """`run(**arguments)`: a trainer that has trained four steps on rows of two lengths."""
    monkeypatch.chdir(tmp_path)
    ids = [torch.randint(10, 97, (9 + row % 2,), generator=torch.Generator().manual_seed(row)).tolist() for row in range(12)]  # fmt: skip
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": [list(range(len(row))) for row in ids]})

    def make(**changes) -> HfLmTrainer:
        options = {
            "output_dir": "run", "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "bf16": False,
            "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
        }  # fmt: skip
        arguments = HfLmTrainingArguments(**{**options, **changes})
        set_seed(arguments.seed if "seed" in changes else 42)
        trainer = HfLmTrainer(HfLmForCausalLM(tiny_config), arguments, PackedCollator(2), rows, rows.take(4))
        trainer.train()
        return trainer

    return make


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """Weights of runs to compare with, by the arguments that they have changed."""
    return {}


def weights(trainer: HfLmTrainer) -> torch.Tensor:
    return torch.cat([weight.flatten() for weight in trainer.model.state_dict().values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHANGE | KEEP if name in TrainingArguments.__dataclass_fields__])
def test_arguments_that_work_change_what_they_should(run, plain, name):
    torch_state = torch.are_deterministic_algorithms_enabled()
    changes = (CHANGE | KEEP)[name]
    base = {key: value for key, value in changes.items() if key != name} if name in BESIDE_OTHERS else {}
    if str(base) not in plain:
        plain[str(base)] = weights(run(**base))
    trained = run(**changes)
    torch.use_deterministic_algorithms(torch_state)
    assert torch.equal(plain[str(base)], weights(trained)) == (name in KEEP)
    assert decisive(trained.args).keys() >= set(CHANGE) - {"load_best_model_at_end"}


def test_what_a_run_would_not_honour_is_refused_in_one_line(recipe):
    values = {
        "debug": "underflow_overflow", "optim_target_modules": "all-linear", "liger_kernel_config": '{"rope": true}',
        "include_for_metrics": "loss", "label_names": "labels", "length_column_name": "size",
        "accelerator_config": '{"split_batches": true}', "parallelism_config": "{}",
    }  # fmt: skip
    off = {"eval_do_concat_batches", "remove_unused_columns", "dataloader_in_order", "skip_memory_metrics"}
    for name, reason in VERDICTS.items():
        if reason is not None:
            value = values.get(name, "false" if name in off else "true")
            with pytest.raises(InputError) as refusal:
                parse_recipe(recipe(), [f"--{name}", value])
            assert name in str(refusal.value) and "\n" not in str(refusal.value), name
    parse_recipe(recipe(do_predict=False, remove_unused_columns=True, skip_memory_metrics=True), [])


@pytest.mark.parametrize(
    ("key", "value"),
    [("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 0), ("lr_decay_ratio", 1.5), ("max_steps", 0),
     ("save_steps", -1), ("learning_rate", -0.1), ("max_grad_norm", -1.0)],
)  # fmt: skip
def test_values_out_of_range_are_refused(recipe, key, value):
    with pytest.raises(InputError, match=f"{key}: must be .*got {value}"):
        parse_recipe(recipe(**{key: value}), [])


@pytest.mark.parametrize(("named", "said"), [("/not/there", "/not/there is no checkpoint"), ("true", "no valid")])
def test_a_checkpoint_to_resume_from_must_be_there(recipe, tmp_path, named, said):
    with pytest.raises(InputError, match=said):
        train(*parse_recipe(recipe(), ["--resume_from_checkpoint", named]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_that_is_named(recipe, tmp_path):
    path = recipe(eval_strategy="no", report_to="none", max_steps=8)

    def parsed(*words: str):
        return parse_recipe(path, list(words))

    straight = train(*parsed())
    named = str(tmp_path / "run" / "checkpoint-4")
    other = str(tmp_path / "other")
    resumed = train(*parsed("--resume_from_checkpoint", named, "--output_dir", other))
    assert resumed["train_loss"] == straight["train_loss"] and resumed["steps"] == 8
    assert "resume_from" not in (tmp_path / "other" / "recipe.yaml").read_text()
    history = json.loads((Path(other) / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [4, 8] and not Path(
        other, "checkpoint-4"
    ).exists()
    for words, message in (
        (["--resume_from_checkpoint", "/not/there"], "resume_from_checkpoint: /not/there is no checkpoint"),
        (["--resume_from_checkpoint", named, "--max_steps", "9", "--output_dir", other + "2"], "max_steps 8 -> 9"),
        (["--resume_from_checkpoint", named, "--overwrite"], "overwrite: would delete .*checkpoint-4"),
        (["--resume_from_checkpoint", named, "--output_dir", other], "already holds a run"),
        (["--resume_from_checkpoint", "true", "--output_dir", other + "3"], "holds no valid checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            train(*parsed(*words))
    arguments = parsed("--resume_from_checkpoint", "true")[2]
    arguments.allow_changes = True  # keys of the recipe are not in these
    assert check_output_dir(arguments) == os.path.join(tmp_path, "run", "checkpoint-8")
