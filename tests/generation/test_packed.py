"""A model made ready to write text computes what it computed before."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.errors import InputError
from hf_lm.generation.packed import (
    HAS_FBGEMM,
    HAS_VNNI,
    PackedLinear,
    PackedRMSNorm,
    append,
    can_optimize,
    computes_in_bfloat16,
    is_plain,
    optimize_for_inference,
)
from hf_lm.modeling_hf_lm import HfLmOffsetRMSNorm, HfLmRMSNorm

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


def test_a_cache_with_room_holds_what_the_librarys_holds():
    torch.manual_seed(0)
    ours, theirs = DynamicCache(), DynamicCache()

    def narrow(layer) -> None:
        layer.keys, layer.values = layer.keys[:1], layer.values[:1]

    def both(tokens: int, batch: int = 2) -> None:
        key, value = torch.randn(2, batch, 3, tokens, 4)
        for got, want in zip(append(ours, key, value, 0, {}), theirs.update(key, value, 0), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)

    for tokens in (5, 1, 1, 7, 1):
        both(tokens)
    rooms = ours.layers[0].rooms
    both(1)
    assert ours.layers[0].rooms is rooms  # written behind the others
    for change in (
        lambda cache: cache.crop(-4),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 3])),
        lambda cache: narrow(cache.layers[0]),
        lambda cache: cache.reset(),
    ):
        kept = ours.layers[0].keys.clone()
        copied = copy.deepcopy(ours)
        change(ours), change(theirs)
        batch = len(ours.layers[0].keys) if ours.layers[0].is_initialized else 2
        for _ in range(3):
            both(1, batch)
        torch.testing.assert_close(copied.layers[0].keys, kept, rtol=0, atol=0)


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


def scaled_rows(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, 1, width) * torch.logspace(-3, 3, rows)[:, None, None]


@pytest.mark.parametrize("vnni", sorted({False, HAS_VNNI}))
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_eight_bit_products_round_each_row_by_its_own_numbers(monkeypatch, rows, vnni):
    monkeypatch.setattr("hf_lm.generation.packed.HAS_VNNI", vnni)
    layer, x, residual = torch.nn.Linear(400, 240), scaled_rows(rows, 400), torch.randn(rows, 1, 240)
    packed = PackedLinear(layer, bits=8)
    assert packed.weight_bytes == (1 if HAS_FBGEMM else 4) * layer.weight.numel()
    want = layer(x) + residual
    assert ((packed(x, residual) - want).norm(dim=-1) < 0.015 * want.norm(dim=-1)).all()


def test_eight_bit_products_of_a_row_do_not_depend_on_the_rows_beside_it():
    layer, x = torch.nn.Linear(64, 24), scaled_rows(9, 64)
    packed = PackedLinear(layer, bits=8)
    x[2], x[5], x[6] = 100.0, 0.0, 1e4
    x[6, 0, 0] += 0.001  # the next number that float32 has
    together, want = packed(x), layer(x)
    assert ((together - want).norm(dim=-1) < 0.02 * want.norm(dim=-1)).all()
    for first in (0, 4, 7):
        assert torch.equal(packed(x[first : first + 2]), together[first : first + 2])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
def test_eight_bit_products_do_not_overflow(rows, sign):
    layer = torch.nn.Linear(512, 16, bias=False)
    layer.weight.data.fill_(3.0)
    x = torch.full((rows, 512), sign * 5.0)
    x[:, -1] = 0  # the numbers are rounded to 0 and 255, or 255 and 0
    torch.testing.assert_close(PackedLinear(layer, bits=8)(x), layer(x), rtol=0.01, atol=0)


@pytest.mark.slow
def test_eight_bit_products_do_not_overflow_without_vnni(monkeypatch):
    code = """
from hf_lm.generation import packed
packed.HAS_VNNI = False
from test_packed import test_eight_bit_products_do_not_overflow as test
for rows in (1, 3):
    for sign in (1, -1):
        test(rows, sign)
"""
    monkeypatch.setenv("FBGEMM_ENABLE_INSTRUCTIONS", "AVX2")
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def test_weights_beyond_the_range_of_sixteen_bits_keep_theirs():
    layer, x = torch.nn.Linear(64, 24), torch.randn(3, 64)
    assert PackedLinear(layer, bits=16).in_half == HAS_FBGEMM
    layer.weight.data *= 2.0**20
    packed = PackedLinear(layer, bits=16)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1.0)
    assert not packed.in_half and packed.weight_bytes == 4 * layer.weight.numel()


@pytest.mark.parametrize("vnni", [False, True])
def test_without_vnni_the_second_projections_of_mlps_keep_sixteen_bits(monkeypatch, vnni):
    monkeypatch.setattr("hf_lm.generation.packed.HAS_VNNI", vnni)
    _, optimized = pair("llama", int8=True)
    bits = {name: module.in_int8 for name, module in optimized.named_modules() if isinstance(module, PackedLinear)}
    assert bits == {name: HAS_FBGEMM and (vnni or not name.endswith("down_proj")) for name in bits}


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_float32_weights_that_sixteen_bits_hold_are_read_in_sixteen_bits(rows):
    layer = torch.nn.Linear(200, 120).bfloat16().float()
    packed, x, residual = PackedLinear(layer), torch.randn(rows, 1, 200), torch.randn(rows, 1, 120)
    assert packed.in_half == HAS_FBGEMM
    assert packed.weight_bytes == (2 if HAS_FBGEMM else 4) * layer.weight.numel()
    want = layer.double()(x.double()) + residual.double()
    torch.testing.assert_close(packed(x, residual).double(), want, rtol=1e-5, atol=1e-5)
    layer = torch.nn.Linear(200, 120)  # 24 bits of significand, and a range beyond that of float16
    assert not PackedLinear(layer).in_half
    layer.weight.data = torch.full_like(layer.weight, 2.0**17)
    assert not PackedLinear(layer).in_half


@pytest.mark.parametrize("offset", [False, True])
def test_the_shorter_norm_equals_the_norm(offset):
    norm = (HfLmOffsetRMSNorm if offset else HfLmRMSNorm)(64, 1e-5).requires_grad_(False).eval()
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
