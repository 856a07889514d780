"""
Private names of other libraries: one list with the reason for each. A release that removes one fails here, by name.

To add a use: look for a public way first, then add a row. To remove one: delete its row, or its file from the row.
"""

import importlib.util

import pytest
from helpers.private_names import exists, private_names

# What these libraries document or expect of those who write a model class, a metric or a dataset builder.
CONVENTIONS = {
    "_attn_implementation", "_can_compile_fullgraph", "_can_record_outputs", "_fsdp_plan", "_init_weights",
    "_keys_to_ignore_on_save", "_no_split_modules", "_pp_plan", "_skip_keys_device_placement", "_supports_attention_backend",
    "_supports_flash_attn", "_supports_flex_attn", "_supports_sdpa", "_tied_weights_keys", "_tp_plan",
    "_compute", "_generate_tables", "_info", "_split_generators",
}  # fmt: skip
TRAINER = "transformers.Trainer."
# name: (files in hf_lm/, why it is used, the public way that is missing)
PRIVATE = {
    "datasets.Dataset._fingerprint": (
        "data/cache.py data/documents.py data/pipeline.py",
        "names the cache of what is made from a dataset",
        "a public fingerprint of a dataset",
    ),
    "torch._C.DisableTorchFunctionSubclass": (
        "generation/packed.py", "skips Python dispatch on each token", "no public switch"
    ),
    "torch._C._are_functorch_transforms_active": (
        "functional_hf_lm.py kernels/gradients.py",
        "torch.func cannot differentiate the hand-written backward",
        "a predicate for active transforms",
    ),
    "torch._C._autograd._get_current_graph_task_keep_graph": (
        "kernels/loss.py",
        "frees the saved gradient unless retain_graph",
        "a way to ask for retain_graph",
    ),
    "torch._subclasses.fake_tensor": (
        "anatomy.py planning/plan.py",
        "runs a model without memory, and recognizes such a run",
        "a public FakeTensorMode",
    ),
    "torch.autograd.forward_ad._current_level": (
        "kernels/gradients.py",
        "forward-mode derivatives cannot pass the hand-written backward",
        "a predicate for forward mode",
    ),
    "torch.nn.Module._forward_hooks": ("modeling_hf_lm.py", "a hooked head must be called", "a list of hooks"),
    "torch.nn.Module._forward_pre_hooks": ("modeling_hf_lm.py", "a hooked head must be called", "a list of hooks"),
    "torch.ops.aten._to_copy": (
        "training/device_tuning.py", "what `.to()` records", "a public name of the operator"
    ),
    "torch.ops.mkldnn._linear_pointwise": ("generation/packed.py", "matmul on a prepacked weight", "public prepacking"),
    "torch.ops.mkldnn._reorder_linear_weight": ("generation/packed.py", "weight prepacking", "public prepacking"),
    "torch.utils._python_dispatch": ("planning/plan.py", "counts what a step stores", "a public dispatch mode"),
    "torch.utils.data.DataLoader._iterator": (
        "training/loaders.py", "ends persistent workers", "a method that ends workers"
    ),
    "torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown_workers": (
        "training/loaders.py",
        "ends persistent workers",
        "a method that ends workers",
    ),
    "transformers.PreTrainedModel._auto_class": (
        "configuration_hf_lm.py modeling_hf_lm.py",
        "saves an adapter's folder without the code files",
        "an option of save_pretrained",
    ),
    f"{TRAINER}_clip_grad_norm": ("training/trainer.py", "takes the gradient norm once", "grad_norm for callbacks"),
    f"{TRAINER}_load_from_checkpoint": ("training/trainer.py", "rollback", "a public way to load a checkpoint"),
    f"{TRAINER}_load_optimizer_and_scheduler": ("training/trainer.py", "rollback", "a public way to load"),
    f"{TRAINER}_push_from_checkpoint": ("training/trainer.py", "pushes what is committed", "an event after on_save"),
    f"{TRAINER}_save_checkpoint": ("training/trainer.py", "complete or not at all", "on_save"),
}  # fmt: skip


def private_parts(name: str) -> list[str]:
    return [part for part in name.split(".") if part.startswith("_")]


def test_the_list_is_what_the_package_uses():
    rows = [(file, private_parts(name)) for name, row in PRIVATE.items() for file in row[0].split()]
    used = {(file, name) for file, name in private_names() if name not in CONVENTIONS}
    missing = used - {(file, part) for file, parts in rows for part in parts}
    stale = {(file, parts[-1]) for file, parts in rows} - used
    assert not missing, f"used but not listed (look for a public way first): {sorted(missing)}"
    assert not stale, f"listed but no longer used (delete the rows): {sorted(stale)}"


def test_each_row_says_why_and_what_is_missing():
    assert all(len(row) == 3 and all(row) for row in PRIVATE.values())


@pytest.mark.parametrize("name", PRIVATE)
def test_the_installed_release_has_it(name: str):
    if importlib.util.find_spec(name.split(".")[0]) is None:
        pytest.skip("not installed")
    files, reason, _ = PRIVATE[name]
    assert exists(name), f"this release has removed {name}, which hf_lm/{files} uses: {reason}"


def test_a_removed_name_is_noticed():
    assert not exists("transformers.Trainer._not_there") and not exists("torch._not_there.at_all")


def test_the_list_is_short():
    assert len(PRIVATE) <= 20


def test_few_are_of_the_trainer():
    assert sum(name.startswith(TRAINER) for name in PRIVATE) <= 5
