"""What only a CUDA device runs: the compiled loss, attention by lengths, and a whole run there."""

import json

import pytest
import torch
from torch import nn

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.data.collator import PackedCollator
from hf_lm.kernels import loss as chunked
from hf_lm.kernels.varlen import HAS_VARLEN
from hf_lm.training.device_tuning import fit_to_gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, False), (0.5, True)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_loss_without_logits_equals_the_plain_loss(monkeypatch, softcap, scale, bias, is_compiled):
    monkeypatch.setattr(chunked, "slice_shape", lambda *_: (64, 300))  # several slices, the last one short
    torch.manual_seed(0)
    head = nn.Linear(32, 300, bias=bias, device="cuda")
    hidden = torch.randn(3, 90, 32, device="cuda", requires_grad=True)
    labels = torch.randint(0, 300, (3, 90), device="cuda")
    labels[0, :40] = -100
    logits = head(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    inputs = [hidden, *head.parameters()]
    expected_gradients = torch.autograd.grad(expected, inputs)
    compute = chunked.linear_cross_entropy
    if is_compiled:
        compute = torch.compile(compute, fullgraph=True)
    loss = compute(hidden, head, labels, logit_scale=scale, softcap=softcap)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(loss, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def build(attention: str, **changes) -> HfLmForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    free = {"zero_init_residual": False, "initializer_range": 0.1, "attn_implementation": attention}
    return HfLmForCausalLM(HfLmConfig(**sizes, **free, **changes)).cuda().train()


def packed_batch(lengths: bool = True) -> dict:
    """Two rows of documents of different lengths, one of them padded."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for sizes in ([40, 1, 7, 16], [60]):
        ids = torch.randint(0, 300, (sum(sizes),), generator=generator).numpy()
        positions = torch.cat([torch.arange(size) for size in sizes]).numpy()
        rows.append({"input_ids": ids, "labels": ids, "position_ids": positions})
    batch = PackedCollator(0, lengths=lengths)(rows)
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"sliding_window": 9}], ids=str)
@pytest.mark.parametrize("lengths", ["the collator's", "found", "the collator's, compiled"])
def test_attention_by_lengths_equals_attention_by_mask(changes, lengths):
    if not HAS_VARLEN:
        pytest.skip("needs PyTorch 2.11")
    batch, outcomes = packed_batch(lengths != "found"), []
    for attention in ("sdpa", "varlen"):
        model = build(attention, **changes)
        forward = torch.compile(model) if "compiled" in lengths and attention == "varlen" else model
        with torch.autocast("cuda", torch.bfloat16):
            outputs = forward(**batch, use_cache=False)
            outputs.loss.backward()
        outcomes.append((outputs.loss, model.model.layers[0].self_attn.k_proj.weight.grad))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-3, atol=1e-3)
    slack = float(outcomes[0][1].abs().max()) / 50
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=0.05, atol=slack)


def test_a_compiled_step_that_keeps_less_has_the_same_gradients():
    batch, outcomes = packed_batch(), []
    for recompute in (False, True):
        model = build("sdpa")
        fit_to_gpu(model, half=True, recompute=recompute)
        torch.compiler.reset()
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.compile(model)(**batch, use_cache=False).loss
        loss.backward()
        outcomes.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=float(other.abs().max()) / 50)


@pytest.mark.parametrize("compiles", ["false", "true"])
def test_a_run_trains_there_and_says_its_utilization(tmp_path, moby_dick, compiles):
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(moby_dick[:60_000])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"train_file: {text}\noutput_dir: {folder}\nvocab_size: 512\nblock_size: 64\nmax_steps: 40\nlogging_steps: 10\n"
        "config_overrides: hidden_size=64,num_hidden_layers=2,num_attention_heads=2\nlearning_rate: 0.003\n"
        f"muon_learning_rate: 0.02\nper_device_train_batch_size: 8\ntorch_compile: {compiles}\nvalidation_split_percentage: 10\n"
    )
    assert main(["train", str(recipe)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    losses = [
        entry["loss"]
        for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert losses[-1] < losses[0] and metrics["bits_per_byte"] < 4
    assert metrics["hardware"] == torch.cuda.get_device_name() and metrics["peak_device_memory_bytes"] > 0
    share = metrics["model_flops_utilization"]
    assert share is None or 0 < share < 1
