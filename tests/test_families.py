"""Each family's own model and ours, with the same weights, compute the same."""

import pytest
import torch
from tiny_families import CASES, case_name, is_constant, tiny_model

from hf_lm import HfLmForCausalLM
from hf_lm.interop.families import FAMILIES

torch.set_num_threads(1)

ROPES = {
    "default": {"rope_theta": 1000.0},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
}


def both(family: str, attention: str, folder, **options) -> tuple[torch.nn.Module, HfLmForCausalLM]:
    """The library's model and ours, read from what the library's saved."""
    native = tiny_model(family, **options)
    native.save_pretrained(folder)
    native.set_attn_implementation(attention if native._supports_sdpa else "eager")
    return native, HfLmForCausalLM.from_pretrained(folder, attn_implementation=attention)


def assert_same(native, ours, folder) -> None:
    ids = torch.randint(0, 99, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    outputs = [model(input_ids=ids, labels=ids) for model in (native, ours)]
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=0, atol=1e-5)
    # given, since ours count real tokens where the library's (GPT-2) count padding too
    places = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0)}
    padded = [model(input_ids=ids, **places).logits[mask.bool()] for model in (native, ours)]
    torch.testing.assert_close(padded[1], padded[0], rtol=0, atol=1e-5)

    for output in outputs:
        output.loss.backward()
    generated = [
        model.generate(ids[:, :8], max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        for model in (native, ours)
    ]
    assert generated[0].shape[1] == 40
    assert torch.equal(*generated)

    with torch.no_grad():  # their gradients, in place of their weights, take the same way to our names and layouts
        for name, parameter in native.named_parameters():
            if not is_constant(name):
                parameter.copy_(parameter.grad)
    native.save_pretrained(folder)
    theirs = dict(HfLmForCausalLM.from_pretrained(folder).named_parameters())
    for name, mine in ours.named_parameters():
        torch.testing.assert_close(
            mine.grad, theirs[name].data, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# SDPA has no soft cap: neither model runs it
ATTENTION = [  # SDPA has no soft cap
    pytest.param(family, options, attention, marks=pytest.mark.slow if attention == "eager" and has_sdpa else ())
    for family, options in CASES
    for has_sdpa in [not options.get("attn_logit_softcapping")]
    for attention in (("eager", "sdpa") if has_sdpa else ("eager",))
]


@pytest.mark.parametrize(("family", "options", "attention"), ATTENTION, ids=case_name)
def test_family_gives_the_same_logits_gradients_and_tokens(family, options, attention, tmp_path):
    assert_same(*both(family, attention, tmp_path, **options), tmp_path)


@pytest.mark.parametrize("rope_type", ROPES)
def test_rope_type_gives_the_same_logits_gradients_and_tokens(rope_type, tmp_path):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0} | ROPES[rope_type]
    options = {"max_position_embeddings": 16} if rope_type == "dynamic" else {}  # it scales longer sequences only
    assert_same(*both("llama", "sdpa", tmp_path, rope_parameters=rope, **options), tmp_path)


def test_every_family_is_tested():
    assert {family for family, _ in CASES} == set(FAMILIES)
