"""What a person may have meant by a name that is no key: other tools' names, fields of the model, typing errors."""

import difflib
from collections.abc import Collection

# Key of a recipe: its names elsewhere.
KEYS = {
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_device_batch_size bs",
    "per_device_eval_batch_size": "eval_batch_size validation_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps accumulate_grad_batches",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "steps num_steps n_steps train_steps max_train_steps max_iters iterations total_steps",
    "learning_rate": "lr rate max_lr peak_lr",
    "muon_learning_rate": "muon_lr lr_muon",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule schedule",
    "lr_decay_ratio": "decay_ratio cooldown",
    "warmup_steps": "warmup warmup_ratio warmup_iters num_warmup_steps",
    "weight_decay": "wd decay",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping clip_grad_norm",
    "optim": "optimizer",
    "eval_strategy": "evaluation_strategy",
    "eval_steps": "eval_interval eval_every eval_frequency evaluation_steps val_interval",
    "logging_steps": "log_steps log_interval log_every logging_interval",
    "save_steps": "save_interval save_every checkpoint_steps checkpoint_interval",
    "report_to": "logger log_to wandb",
    "early_stopping_patience": "patience early_stopping",
    "seed": "random_seed random_state",
    "bf16": "bfloat16 mixed_precision precision dtype torch_dtype",
    "gradient_checkpointing": "activation_checkpoint checkpointing",
    "model_name_or_path": "model model_name model_path base_model checkpoint pretrained pretrained_model",
    "architecture": "model_type arch family model_family architectures",
    "tokenizer_name": "tokenizer tokenizer_path tokenizer_name_or_path",
    "attn_implementation": "attention attn flash_attention",
    "use_peft": "lora use_lora peft adapter finetuning_type",
    "lora_r": "lora_rank rank",
    "lora_target_modules": "lora_target target_modules",
    "train_file": "data data_file data_files train_data training_file train_files text_file dataset_path",
    "validation_file": "eval_file val_file valid_file dev_file eval_data val_data validation_data validation_files",
    "test_file": "test_data test_files",
    "dataset_name": "dataset datasets",
    "validation_split_percentage": "val_split validation_split eval_split val_size test_size split",
    "text_column_name": "text_column text_field dataset_text_field content_column",
    "label_column_name": "label_column label_field",
    "class_names": "labels label_names_ id2label num_labels classes",
    "prompt_template": "prompt template",
    "block_size": "context_length max_length max_seq_length max_seq_len seq_len seq_length sequence_length context "
    "context_size cutoff_len sequence_len ctx_len n_ctx n_positions",
    "output_dir": "output out_dir out save_dir output_folder output_path",
    "sample_prompts": "prompts samples sample_prompt",
    "resume": "continue restart",
    "overwrite": "overwrite_output_dir force",
}
# Field of HfLmConfig: its names elsewhere.
FIELDS = {
    "hidden_size": "d_model dim n_embd n_embed embed_dim embedding_size embedding_dim width model_dim hidden_dim",
    "num_hidden_layers": "n_layers n_layer num_layers layers depth",
    "num_attention_heads": "n_heads n_head num_heads heads attention_heads",
    "num_key_value_heads": "n_kv_heads num_kv_heads kv_heads",
    "intermediate_size": "d_ff ffn_dim ff_dim mlp_dim ffn_hidden_size",
    "residual_dropout": "dropout resid_pdrop hidden_dropout",
    "hidden_act": "activation activation_function act",
    "tie_word_embeddings": "tie_embeddings tie_weights",
}


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: target for target, names in table.items() for name in names.split()}


def closest(name: str, known: Collection[str], others: dict[str, str]) -> str | None:
    """The known name that one stands for elsewhere, or that is written nearly the same; or None."""
    name = name.lower().replace("-", "_")
    targets = {other: target for other, target in _by_name(others).items() if target in known}
    targets |= {one: one for one in known}
    if name in targets:
        return targets[name]
    close = difflib.get_close_matches(name, targets, n=1, cutoff=0.75)
    return targets[close[0]] if close else None


def hint(name: str, keys: Collection[str], fields: Collection[str]) -> str:
    """The end of the sentence that says that `name` is no key."""
    field = closest(name, fields, FIELDS)
    key = closest(name, keys, KEYS)
    as_field = f"; it is a field of the model: did you mean config_overrides: {{{field}: ...}}?"
    if field and (key is None or name in fields or name in FIELDS.get(field, "").split()):
        return as_field
    return f"; did you mean {key!r}?" if key else "."
