"""What a recipe may say of `transformers.TrainingArguments`: each argument works, or is refused with the reason."""

from ..errors import InputError

BY_TASK = "the task decides it"
WHOLE_SETS = "scores are made of whole sets; it is for a `compute_metrics` of one's own"
MEASURED = "hf_lm measures it itself (`metrics.json`, `report.html`)"

# argument: None if it works, else why it is refused. tests/training/test_verdicts.py tries each that works.
VERDICTS: dict[str, str | None] = dict.fromkeys((
    "output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "gradient_accumulation_steps", "average_tokens_across_devices", "max_grad_norm",
    "label_smoothing_factor", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32",
    "activation_checkpointing", "activation_checkpointing_kwargs",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "neftune_noise_alpha", "torch_empty_cache_steps", "logging_strategy", "logging_steps",
    "logging_first_step", "log_on_each_node", "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level",
    "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
    "eval_on_start", "eval_accumulation_steps", "save_only_model", "save_strategy", "save_steps", "save_on_each_node",
    "save_total_limit", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
    "hub_always_push", "hub_revision", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "full_determinism", "seed", "data_seed", "use_cpu", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "train_sampling_strategy", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp",
    "fsdp_config", "deepspeed", "do_train", "do_eval", "resume_from_checkpoint", "local_rank",
)) | {
    "optim_target_modules": "it is for GaLore and Apollo; Muon trains the layers' matrices here",
    "use_liger_kernel": "its kernels are for other models' classes",
    "liger_kernel_config": "its kernels are for other models' classes",
    "use_cache": "training has no use for a cache; the finished model's is on",
    "auto_find_batch_size": "another batch size trains another model; `hf-lm plan` says which one fits",
    "prediction_loss_only": WHOLE_SETS,
    "eval_do_concat_batches": WHOLE_SETS,
    "eval_use_gather_object": WHOLE_SETS,
    "include_for_metrics": WHOLE_SETS,
    "batch_eval_metrics": WHOLE_SETS,
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint without it",
    "ignore_data_skip": "a resumed run continues at the exact batch",
    "restore_callback_states_from_checkpoint": "a resumed run restores what early stopping has counted",
    "accelerator_config": "`per_device_train_batch_size` and the number of processes decide who gets which rows",
    "parallelism_config": "use `fsdp` or `deepspeed` to train with several devices",
    "dataloader_in_order": "a run whose batches come in any order cannot be resumed exactly",
    "remove_unused_columns": BY_TASK,
    "label_names": BY_TASK,
    "length_column_name": "`group_by_length` counts the tokens of the rows",
    "debug": "`on_divergence` names the step, the rows and the first gradient that is not finite",
    "skip_memory_metrics": MEASURED,
    "do_predict": "`test_file` is scored at the end of every run",
}  # fmt: skip


def refuse_arguments(changed: dict) -> None:
    """
    Raises:
        InputError: a recipe changes an argument that a run does not honour.
    """
    for name, value in changed.items():
        reason = VERDICTS.get(name)
        if reason is not None and value not in (None, [], {}, ""):
            raise InputError(f"{name}: not in a recipe: {reason}.".replace("`", ""))


def verdict_table() -> str:
    """All arguments as a Markdown table."""
    rows = [f"| `{name}` | {'works' if why is None else 'refused'} | {why or ''} |" for name, why in VERDICTS.items()]
    return "\n".join(["| argument | verdict | why |", "|---|---|---|", *rows])
