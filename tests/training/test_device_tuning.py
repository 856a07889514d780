"""What the machine is good at decides how a model is trained, not what comes out."""

import math
from copy import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hf_lm import HfLmForCausalLM
from hf_lm.kernels.varlen import HAS_VARLEN
from hf_lm.planning.plan import activation_bytes
from hf_lm.training import device_tuning


@pytest.mark.parametrize(("mlp_type", "kept"), [("plain", 1), ("gated", 2)])
def test_only_models_whose_mlps_keep_much_compute_it_twice(tiny_config, monkeypatch, mlp_type, kept):
    tiny_config.mlp_type = mlp_type
    model = HfLmForCausalLM(tiny_config)
    size = kept * 64 * tiny_config.intermediate_size * tiny_config.num_hidden_layers * 4
    for limit, expected in ((size, False), (size - 1, True)):
        monkeypatch.setattr(device_tuning, "KEPT_BY_MLPS", limit)
        monkeypatch.setattr(device_tuning, "CHEAP_PER_PARAMETER", 1.0)
        device_tuning.fit_to_cpu(model, 2, 32, bfloat16=False)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == [expected, expected]


def test_nothing_is_computed_twice_where_that_is_a_large_part_of_the_step(tiny_config, monkeypatch):
    monkeypatch.setattr(device_tuning, "KEPT_BY_MLPS", 0)
    model = HfLmForCausalLM(tiny_config)
    ratio = tiny_config.hidden_size * tiny_config.num_hidden_layers / model.num_parameters()
    for limit, expected in ((0.99 * ratio, False), (1.01 * ratio, True)):
        monkeypatch.setattr(device_tuning, "CHEAP_PER_PARAMETER", limit)
        device_tuning.fit_to_cpu(model, 2, 32, bfloat16=False)
        assert all(layer.gradient_checkpointing == expected for layer in model.model.layers)


CHANGES = [
    {},
    {"norm_position": "sandwich", "qk_norm": "head", "attention_bias": True, "mlp_bias": True},
    {"residual_dropout": 0.2, "num_key_value_heads": 2, "tie_word_embeddings": False},
    {"parallel_residual": "shared", "attn_implementation": "eager"},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_layers_that_compute_cheap_things_twice_change_no_bit_and_keep_less(tiny_config, monkeypatch, changes, mixed):
    for name, value in changes.items():
        setattr(tiny_config, name, value)
    ids, outcomes, products = torch.randint(0, tiny_config.vocab_size, (2, 40)), [], []
    for limit in (math.inf, 0):
        monkeypatch.setattr(device_tuning, "KEPT_BY_MLPS", limit)
        monkeypatch.setattr(device_tuning, "CHEAP_PER_PARAMETER", 1.0)
        torch.manual_seed(0)
        model = HfLmForCausalLM(copy(tiny_config)).train()
        device_tuning.fit_to_cpu(model, 2, 40, mixed, attention=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        products.append(counter.get_total_flops())
        outcomes.append((loss, *(parameter.grad for parameter in model.parameters())))
    assert all(torch.equal(once, twice) for once, twice in zip(*outcomes, strict=True))
    is_read = changes.keys() & {"norm_position", "residual_dropout"}
    assert products[0] == products[1] or is_read  # no product is computed again


@pytest.mark.parametrize("said", [96, 32])
def test_layers_whose_mlps_have_another_width_than_the_config_says_recompute_as_those_built_so(
    tiny_config, monkeypatch, said
):
    """As after pruning. The other matmuls read 32 numbers, and must not be recomputed."""
    monkeypatch.setattr(device_tuning, "KEPT_BY_MLPS", 0)
    monkeypatch.setattr(device_tuning, "CHEAP_PER_PARAMETER", 1.0)
    ids, outcomes = torch.randint(0, tiny_config.vocab_size, (2, 40)), []
    for width in (tiny_config.intermediate_size, said):
        with FakeTensorMode():
            sketch = HfLmForCausalLM(copy(tiny_config))
        model = HfLmForCausalLM(copy(tiny_config)).train()
        for one in (sketch, model):
            one.config.intermediate_size = width
            device_tuning.fit_to_cpu(one, 2, 40, bfloat16=False, attention=False)
        loss = model(ids, labels=ids, use_cache=False, skip_logits=True).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        outcomes.append((counter.get_total_flops(), activation_bytes(sketch, 2, 40, bf16=False)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("length", "bfloat16", "own", "expected"),
    [(32, True, None, "eager"), (32, False, None, "sdpa"), (513, True, None, "sdpa"), (32, True, "sdpa", "sdpa")],
)
def test_attention_is_written_out_where_that_is_faster(tiny_config, length, bfloat16, own, expected):
    model = HfLmForCausalLM(tiny_config)
    device_tuning.fit_to_cpu(model, 2, length, bfloat16, attention=own is None)
    assert model.config._attn_implementation == expected


def test_attention_whose_probabilities_take_much_is_not_written_out(tiny_config, monkeypatch):
    kept = 2 * 32**2 * tiny_config.num_attention_heads * tiny_config.num_hidden_layers * 2
    for limit, expected in ((kept, "eager"), (kept - 1, "sdpa")):
        model = HfLmForCausalLM(copy(tiny_config))
        monkeypatch.setattr(device_tuning, "KEPT_BY_ATTENTION", limit)
        device_tuning.fit_to_cpu(model, 2, 32, bfloat16=True)
        assert model.config._attn_implementation == expected


def compiled_step(model: HfLmForCausalLM, ids: torch.Tensor, mixed: bool) -> tuple[int, list[torch.Tensor]]:
    """Bytes that the compiled forward keeps, parameters aside; the loss and the gradients."""
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor

    torch.compiler.reset()
    forward = torch.compile(model, backend="aot_eager_decomp_partition")  # keeps what a compiled model keeps
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=mixed)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        loss = forward(ids, labels=ids, use_cache=False, skip_logits=True).loss
    loss.backward()
    return sum(kept.values()), [loss, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("changes", "mixed"),
    [
        pytest.param(changes, mixed, marks=pytest.mark.slow if changes or mixed else ())
        for changes in CHANGES
        for mixed in (False, True)
    ],
    ids=str,
)
def test_compiled_layers_keep_no_norms_and_no_sums(tiny_config, changes, mixed):
    for name, value in changes.items():
        setattr(tiny_config, name, value)
    ids, outcomes = torch.randint(0, tiny_config.vocab_size, (3, 40)), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = HfLmForCausalLM(copy(tiny_config)).train()
        device_tuning.fit_to_gpu(model, mixed, recompute=recompute)
        outcomes.append(compiled_step(model, ids, mixed))
    (much, once), (less, twice) = outcomes
    norms = ids.numel() * tiny_config.hidden_size * tiny_config.num_hidden_layers * (2 if mixed else 4)
    least = 0.5 if "parallel_residual" in changes else 1.5  # one norm a layer, or two and a sum
    assert less <= much - least * norms
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not HAS_VARLEN, reason="PyTorch has it from 2.11 on")
@pytest.mark.parametrize(
    ("device", "half", "changes", "expected"),
    [
        ("cuda", True, {}, "varlen"),
        ("cuda", False, {}, "sdpa"),
        ("cpu", True, {}, "sdpa"),
        ("cuda", True, {"attention_dropout": 0.1}, "sdpa"),
        ("cuda", True, {"attn_logit_softcapping": 5.0}, "eager"),
    ],
)
def test_documents_are_kept_apart_by_their_lengths_where_there_is_a_kernel(
    tiny_config, monkeypatch, device, half, changes, expected
):
    for name, value in changes.items():
        setattr(tiny_config, name, value)
    model = HfLmForCausalLM(tiny_config)
    monkeypatch.setattr(device_tuning, "device_type", lambda: device)
    device_tuning.fit_to_gpu(model, half)
    assert model.config._attn_implementation == expected
