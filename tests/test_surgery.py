"""Layers and embeddings that are added, copied, removed or resized after the model was built."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from hf_lm import HfLmConfig, HfLmForCausalLM

ids = torch.arange(3, 27).reshape(2, 12)
MIXED = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
    "no_rope_layers": [1, 0, 1],
}


def build(**changes) -> HfLmForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}
    return HfLmForCausalLM(
        HfLmConfig(**sizes | {"zero_init_residual": False, "initializer_range": 0.2} | changes)
    ).eval()


def rearrange(model: HfLmForCausalLM, order: list[int]) -> HfLmForCausalLM:
    """As merging tools do: copies of the layers in another order, counted anew."""
    model.model.layers = nn.ModuleList(deepcopy(model.model.layers[i]) for i in order)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(order)
    return model


def by_hand(model: HfLmForCausalLM, order: list[int], config: dict) -> torch.Tensor:
    """Logits of a model that was built with these layers."""
    per_layer = {name: [value[i] for i in order] for name, value in config.items() if isinstance(value, list)}
    built = build(**config | per_layer | {"num_hidden_layers": len(order)})
    built.model.embed_tokens, built.model.norm = model.model.embed_tokens, model.model.norm
    built.lm_head = model.lm_head
    for new, old in enumerate(order):
        built.model.layers[new].load_state_dict(model.model.layers[old].state_dict())
    return built(ids, use_cache=False).logits


@pytest.mark.parametrize("config", [{}, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("order", [[0, 1, 2, 1], [0, 1, 2, 0, 1, 2], [1, 2], [2]], ids=str)
def test_layers_are_computed_as_they_stand(config, order, tmp_path):
    model = build(**config)
    expected = by_hand(model, order, config)
    rearrange(model, order)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    torch.testing.assert_close(model(ids).logits, expected)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == len(again.config.layer_types) == len(order)
    torch.testing.assert_close(again(ids).logits, expected)


@pytest.mark.parametrize("config", [{}, MIXED], ids=["alike", "mixed"])
def test_an_assistant_leaves_early(config):
    """Speculative decoding by the model's own first layers (arXiv:2404.16710): the same text, and config."""
    model = build(**config)
    before = model.config.to_dict()
    kwargs = {"max_new_tokens": 10, "do_sample": False}
    early = model.generate(ids[:1], assistant_early_exit=1, **kwargs)
    assert torch.equal(early, model.generate(ids[:1], **kwargs))
    assert model.config.to_dict() == before
    full = model(ids).logits
    model.config.num_hidden_layers = 1
    expected = by_hand(model, [0], config)
    torch.testing.assert_close(model(ids).logits, expected)
    assert not torch.allclose(full, expected)


@pytest.mark.parametrize(
    "config",
    [{}, {"tie_word_embeddings": False, "lm_head_bias": True}, {"embedding_multiplier": 5.0, "pad_token_id": 2}],
    ids=["tied", "own head with bias", "scaled"],
)
@pytest.mark.parametrize("size", [120, 60])
def test_the_vocabulary_is_resized(config, size, tmp_path):
    model = build(**config)
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    kept = min(size, 97)
    torch.testing.assert_close(model(ids).logits[..., :kept], before[..., :kept])
    labels = torch.full_like(ids, size - 1)
    assert model.train()(labels, labels=labels).loss.isfinite()
    with pytest.raises(ValueError, match=f"input_ids must be between 0 and {size - 1}, got {size}"):
        model(torch.full_like(ids, size))
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(labels).logits, model(labels).logits)


def test_heads_and_weights_are_pruned():
    """Heads by cutting the projections (two of four, with two key/value heads), weights by torch's masks."""
    model = build(num_key_value_heads=2)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.o_proj.weight[:, 16:] = 0  # the second group of heads says nothing
    expected = model(ids).logits
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        projection = attention.get_submodule(name)
        projection.weight = nn.Parameter(projection.weight[:rows].detach())
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :16].detach())
    torch.testing.assert_close(model(ids).logits, expected)

    prune.l1_unstructured(model.lm_head, "weight", 0.5)
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    assert model.train()(ids, labels=ids).loss.isfinite()
