"""A model made ready to write text computes what it computed before."""

import pytest
import torch

from hf_lm import HfLmConfig, HfLmForCausalLM, inference
from hf_lm.errors import InputError
from hf_lm.inference import (
    HAS_HALF,
    PackedLinear,
    PackedRMSNorm,
    can_optimize,
    computes_in_bfloat16,
    is_plain,
    optimize_for_inference,
)
from hf_lm.modeling_hf_lm import HfLmRMSNorm

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
LLAMA = {
    "mlp_type": "gated",
    "hidden_act": "silu",
    "norm_position": "pre",
    "qk_norm": None,
    "zero_init_residual": False,
}
KINDS = {
    "llama": LLAMA,
    "llama3-rope": LLAMA
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, "tie_word_embeddings": False},
    "biases": LLAMA | {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True, "lm_head_bias": True},
    "qwen3": LLAMA | {"qk_norm": "head", "tie_word_embeddings": True},
    "gemma": LLAMA
    | {
        "norm_offset": True,
        "embedding_multiplier": 8.0,
        "hidden_act": "gelu_pytorch_tanh",
        "norm_position": "sandwich",
    },
    "sliding": LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {
        "norm_type": "layernorm",
        "norm_bias": True,
        "mlp_type": "plain",
        "position_embedding_type": "learned",
        "zero_init_residual": False,
    },
    "phi": LLAMA | {"mlp_type": "plain", "parallel_residual": "shared", "zero_init_residual": False},
    "from-scratch defaults": {"zero_init_residual": False},
}
PLAIN = {"llama", "llama3-rope", "biases"}


def pair(kind: str, dtype: torch.dtype = torch.float32, **options) -> tuple[HfLmForCausalLM, HfLmForCausalLM]:
    """The same model as it is, and optimized."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(HfLmForCausalLM(HfLmConfig(**SMALL | KINDS[kind])).to(dtype).eval())
    return models[0], optimize_for_inference(models[1], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimized_model_gives_the_same_logits_and_loss(kind):
    plain, optimized = pair(kind)
    assert is_plain(plain.config) == (kind in PLAIN)
    ids = torch.randint(0, 128, (3, 20))
    with torch.no_grad():
        want, got = plain(ids, labels=ids), optimized(ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3, "do_sample": False, "repetition_penalty": 1.1},
        {"cache_implementation": "static", "do_sample": False},
    ],
    ids=["greedy", "beams", "prompt lookup", "static cache"],
)
def test_an_optimized_model_writes_the_same_tokens(kind, how):
    plain, optimized = pair(kind)
    ids, mask = torch.randint(3, 128, (1 if "prompt_lookup_num_tokens" in how else 2, 12)), None
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[1, :5] = 0  # padding on the left
    how = how | {"max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": 1}
    want = plain.generate(ids, attention_mask=mask, **how)
    assert torch.equal(optimized.generate(ids, attention_mask=mask, **how), want)


def test_packed_documents_do_not_see_each_other_in_an_optimized_model():
    plain, optimized = pair("llama")
    ids, positions = torch.randint(0, 128, (1, 12)), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad():
        got = optimized(ids, position_ids=positions).logits
        torch.testing.assert_close(got, plain(ids, position_ids=positions).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[:, 5:], optimized(ids[:, 5:]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "from-scratch defaults"])
def test_bfloat16_differs_by_its_rounding_only(kind):
    plain, optimized = pair(kind, torch.bfloat16)
    exact, _ = pair(kind)
    exact.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 128, (3, 20))
    with torch.no_grad():
        want = exact(ids).logits
        error = (optimized(ids).logits.float() - want).norm() / want.norm()
        usual = (plain(ids).logits.float() - want).norm() / want.norm()
    assert optimized(ids).logits.dtype == (torch.bfloat16 if computes_in_bfloat16() else torch.float32)
    assert error < 1.2 * usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_stay_close_and_rows_do_not_depend_on_the_batch(kind, dtype):
    plain, optimized = pair(kind, dtype, int8=True)
    ids = torch.randint(0, 128, (4, 20))
    with torch.no_grad():
        want, got = plain(ids).logits.float(), optimized(ids).logits.float()
        alone = optimized(ids[:1]).logits.float()
    assert (got - want).norm() < 0.1 * want.norm()
    torch.testing.assert_close(got[:1], alone, rtol=1e-3, atol=0.02 * float(want.std()))


@pytest.mark.parametrize("width", [64, 40])  # the product of few rows takes multiples of 16 only
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_eight_bit_weights_multiply_inputs_as_exact_as_sixteen_bits(rows, width):
    layer = torch.nn.Linear(width, 24).to(torch.bfloat16)
    packed = PackedLinear(layer, int8=True)
    x = torch.randn(rows, 1, width, dtype=torch.bfloat16) * torch.logspace(-3, 3, rows)[:, None, None].bfloat16()
    x[-1, 0, 0] = 40 * x[-1].abs().max()  # an outlier, which would leave the others no bits
    residual = torch.randn(rows, 1, 24, dtype=torch.bfloat16)
    weight = (layer.weight.float() / packed.scales[:, None]).round().double() * packed.scales[:, None]
    want = x.double() @ weight.T + layer.bias.double() + residual.double()
    assert (packed(x, residual).double() - want).norm() < 0.006 * want.norm()


def test_eight_bit_weights_beyond_the_range_of_sixteen_keep_theirs(monkeypatch):
    monkeypatch.setattr(inference, "HAS_INT8", False)  # as on a CPU that does not multiply the 8 bits themselves
    layer = torch.nn.Linear(64, 24)
    layer.weight.data *= 2.0**20
    packed, x = PackedLinear(layer, int8=True), torch.randn(3, 64)
    weight = (layer.weight / packed.scales[:, None]).round() * packed.scales[:, None]
    torch.testing.assert_close(packed(x), x @ weight.T + layer.bias, rtol=1e-5, atol=1.0)
    assert not packed.in_half and packed.weight_bytes == 4 * layer.weight.numel()


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_float32_weights_that_sixteen_bits_hold_are_read_in_sixteen_bits(rows):
    layer = torch.nn.Linear(200, 120).bfloat16().float()
    packed, x, residual = PackedLinear(layer), torch.randn(rows, 1, 200), torch.randn(rows, 1, 120)
    assert packed.in_half == HAS_HALF
    assert packed.weight_bytes == (2 if HAS_HALF else 4) * layer.weight.numel()
    want = layer.double()(x.double()) + residual.double()
    torch.testing.assert_close(packed(x, residual).double(), want, rtol=1e-5, atol=1e-5)
    layer = torch.nn.Linear(200, 120)  # 24 bits of significand, and a range beyond that of float16
    assert not PackedLinear(layer).in_half
    layer.weight.data = torch.full_like(layer.weight, 2.0**17)
    assert not PackedLinear(layer).in_half


@pytest.mark.parametrize("offset", [False, True])
def test_the_shorter_norm_equals_the_norm(offset):
    norm = HfLmRMSNorm(64, 1e-5, offset).requires_grad_(False).eval()
    norm.weight.normal_()
    x = torch.randn(3, 5, 64) * torch.logspace(-6, 3, 5)[:, None]
    torch.testing.assert_close(PackedRMSNorm(norm)(x), norm(x), rtol=2e-6, atol=1e-9)


def test_an_optimized_model_refuses_to_be_saved(tmp_path):
    _, optimized = pair("llama")
    with pytest.raises(InputError, match="Load it anew"):
        optimized.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_optimized_is_refused():
    model = HfLmForCausalLM(HfLmConfig(**SMALL)).to(torch.float16)
    assert not can_optimize(model)
    with pytest.raises(InputError, match="float16"):
        optimize_for_inference(model)
    _, optimized = pair("llama")
    assert not can_optimize(optimized)
