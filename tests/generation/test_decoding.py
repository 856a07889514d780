"""Decoding: seeded sampling disturbs nobody, a batch answers as its prompts do alone, prompts fit the context."""

import pytest
import torch
from helpers.models import book_tokenizer, small_model

from hf_lm.errors import InputError
from hf_lm.generation.decoding import GREEDY, continue_prompts, decoding_settings, generate_batch, seeded
from hf_lm.generation.prompts import encode_prompt, room_for_answer


@pytest.fixture(scope="module")
def tokenizer():
    return book_tokenizer()


@pytest.fixture
def model(tokenizer):
    return small_model(tokenizer, eos_token_id=None)  # answers are as long as they may be


def test_samples_repeat_and_leave_random_numbers_and_mode_alone(model, tokenizer):
    model.train()
    state = torch.get_rng_state()
    first, second = (continue_prompts(model, tokenizer, ["Call me", ""], 8, count=2, seed=3) for _ in range(2))
    assert first == second and torch.equal(torch.get_rng_state(), state) and model.training
    assert [sample["prompt"] for sample in first] == ["Call me", "Call me", "", ""]
    assert first[0]["text"].startswith("Call me") and first[0] != first[1]
    assert first != continue_prompts(model, tokenizer, ["Call me", ""], 8, count=2, seed=4)


def test_generators_of_all_devices_are_restored(monkeypatch):
    """CUDA's are stood in for by a list: `torch.manual_seed` seeds those of all devices."""
    states = ["first device", "second device"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(states))
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    with pytest.raises(ZeroDivisionError), seeded(5, torch.device("cuda", 1)):
        states[:] = ["seeded", "seeded"]
        _ = 1 / 0
    assert states == ["first device", "second device"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_a_gpu_are_restored():
    torch.cuda.manual_seed(1)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    with seeded(5, torch.device("cuda", 0)):
        torch.rand(9, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_batch_answers_as_its_prompts_do_alone(model, tokenizer):
    prompts = [encode_prompt(tokenizer, text) for text in ("Call me", "The whale, the whale, the whale", "a")]
    model.eval()
    alone = [generate_batch(model, [ids], 12, **GREEDY)[0] for ids in prompts]
    assert generate_batch(model, prompts, 12, **GREEDY) == alone
    model.generation_config.eos_token_id = alone[0][3]
    ended = generate_batch(model, prompts, 12, **GREEDY)
    assert ended[0] == alone[0][: alone[0].index(alone[0][3]) + 1]  # up to the first token that stops it


def test_room_is_what_the_context_leaves(model):
    limit = model.config.max_position_embeddings
    assert room_for_answer(model, [1] * 10, 5) == 5 and room_for_answer(model, [1] * (limit - 3), 5) == 3
    with pytest.raises(InputError, match=f"--prompt: has {limit} tokens; the model takes {limit}"):
        room_for_answer(model, [1] * limit, 5, "--prompt")
    with pytest.raises(InputError, match="prompt: must not be empty"):
        room_for_answer(model, [], 5)


def test_temperature_0_is_greedy():
    assert decoding_settings(0, 0.9) == GREEDY
    assert decoding_settings(0.5, 0.9) == {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
