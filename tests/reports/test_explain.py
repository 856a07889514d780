"""What `inspect` shows is what the model computes, for every family."""

import copy
import math

import pytest
import torch
from tiny_families import tiny_model

from hf_lm.anatomy import decoder_layers
from hf_lm.errors import InputError
from hf_lm.interop.families import FAMILIES
from hf_lm.reports.explain import (
    attention_weights,
    head_ablation,
    inspect_text,
    integrated_gradients,
    lens_logits,
    output_projection,
    text_nats,
)
from hf_lm.tokenization import train_tokenizer

IDS = torch.tensor([[1, 20, 30, 40, 50, 30, 60, 7]])


@pytest.fixture(scope="module", params=["hf_lm", *FAMILIES])
def any_model(request):
    if request.param == "hf_lm":
        from hf_lm import HfLmConfig, HfLmForCausalLM

        torch.manual_seed(0)
        config = HfLmConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            zero_init_residual=False, initializer_range=0.2, final_logit_softcapping=15.0, max_position_embeddings=64,
        )  # fmt: skip
        return HfLmForCausalLM(config).eval()
    return tiny_model(request.param).eval()


@torch.no_grad()
def test_attention_rows_are_probabilities_of_earlier_tokens(any_model):
    weights, logits = attention_weights(any_model, IDS)
    assert weights.shape == (3, 4, 8, 8)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 8))
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()
    torch.testing.assert_close(logits, any_model(IDS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lens_ends_with_the_models_logits_and_leaves_no_hook(any_model):
    before = any_model(IDS).logits
    rows = list(lens_logits(any_model, IDS))
    assert len(rows) == 4
    assert torch.equal(rows[-1], before) and torch.equal(any_model(IDS).logits, before)
    assert all(not torch.equal(row, before) for row in rows[:-1])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_lens_is_norm_and_head_of_the_hidden_states(family):
    model = tiny_model(family).eval()
    norm = {"gpt2": lambda: model.transformer.ln_f, "gpt_neox": lambda: model.gpt_neox.final_layer_norm}
    norm = norm.get(family, lambda: model.model.norm)()
    hidden_states = model(IDS, output_hidden_states=True).hidden_states
    for row, hidden in zip(list(lens_logits(model, IDS))[:-1], hidden_states[:-1], strict=True):
        torch.testing.assert_close(row, model.get_output_embeddings()(norm(hidden)))


@torch.no_grad()
def test_a_silenced_head_is_one_whose_output_weights_are_zero(any_model):
    cost = head_ablation(any_model, IDS, batch_size=3)
    assert cost.shape == (3, 4)
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        changed = copy.deepcopy(any_model)
        weight = output_projection(decoder_layers(changed)[layer]).weight
        inputs = weight if type(output_projection(decoder_layers(changed)[layer])).__name__ == "Conv1D" else weight.T
        size = inputs.shape[0] // 4
        inputs[head * size : (head + 1) * size] = 0
        expected = text_nats(changed, IDS) - text_nats(any_model, IDS)
        torch.testing.assert_close(cost[layer, head], expected[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("target", [3, 7])
def test_attributions_add_up_to_the_change_they_explain(any_model, target):
    result = integrated_gradients(any_model, IDS, target, neutral=5)
    assert abs(result["gap"]) <= 0.01 * max(1, abs(result["end"] - result["start"])) + 1e-4
    assert math.isclose(sum(result["values"]), result["end"] - result["start"], abs_tol=0.05)
    assert all(value == 0 for value in result["values"][target:])  # what comes later has no part in it
    with torch.no_grad():
        log_probabilities = any_model(IDS).logits[0, target - 1].log_softmax(-1)
    assert math.isclose(result["end"], log_probabilities[IDS[0, target]].item(), rel_tol=1e-3)


def test_attributions_of_a_linear_model_are_its_weights():
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(9, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, inputs_embeds, use_cache):
            total = inputs_embeds.cumsum(1).sum(-1, keepdim=True)
            logits = torch.cat((total, (1 - total.exp()).clamp(min=1e-9).log()), dim=-1)  # log P(0) = total
            return type("Output", (), {"logits": logits})

    model = Linear()
    model.embedding.weight.data = -torch.rand(9, 4) / 10
    ids = torch.tensor([[1, 2, 3, 0]])
    result = integrated_gradients(model, ids, 3, neutral=4)
    expected = (model.embedding(ids) - model.embedding(torch.tensor([[1, 4, 4, 4]]))).sum(-1)[0]
    assert result["values"][:3] == pytest.approx(expected[:3].tolist(), abs=1e-5)


def test_the_whole_report_and_its_limits(moby_dick):
    from hf_lm import HfLmConfig, HfLmForCausalLM

    tokenizer = train_tokenizer([moby_dick[:30_000]], 300)
    model = HfLmForCausalLM(HfLmConfig(vocab_size=300, hidden_size=32, max_position_embeddings=32)).eval()
    data = inspect_text(model, tokenizer, "The whale 鲸.", target=2)
    assert data["tokens"][0] == "<|bos|>" and data["bits"][0] is None
    assert math.isclose(
        sum(data["bits"][1:]),
        text_nats(model, torch.tensor([tokenizer("The whale 鲸.")["input_ids"]])).item() / math.log(2),
        rel_tol=1e-4,
    )
    assert data["attribution"]["target"] == 3 and len(data["lens"]) == 7
    assert max(data["checks"].values()) < 1e-2
    assert model.config._attn_implementation == "sdpa"
    for text, target, message in (
        ("", None, "between 1 and 31"),
        ("word " * 40, None, "31"),
        ("The whale", 9, "target.*9"),
    ):
        with pytest.raises(InputError, match=message):
            inspect_text(model, tokenizer, text, target)
