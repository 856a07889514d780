"""PEFT and TRL take the model as it is."""

import pytest
import torch
from datasets import Dataset
from helpers.models import book_tokenizer, save_small_model

from hf_lm import HfLmForCausalLM
from hf_lm.interop.adapters import untie

pytestmark = pytest.mark.slow

CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {% generation %}{{ m['content'] }}{% endgeneration %}<|eos|>{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = book_tokenizer(400)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def model(tokenizer, tmp_path):
    """Saved and loaded, since TRL loads its reference model from where the model came from."""
    changes = {"max_position_embeddings": 1024, "zero_init_residual": True, "initializer_range": 0.02}
    return HfLmForCausalLM.from_pretrained(save_small_model(tmp_path / "model", tokenizer, **changes))


def settings(config_class, folder, **keys):
    return config_class(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        bf16=False, save_strategy="no", logging_steps=1, **keys,
    )  # fmt: skip


def changed(model, before: dict) -> bool:
    return any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def snapshot(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_lora_adapts_saves_and_merges(model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = torch.randint(3, 400, (2, 12))
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    adapted.eval()
    expected = adapted(ids).logits
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(HfLmForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, expected)
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_on_the_assistants_words(model, tokenizer, tmp_path, packing):
    from trl import SFTConfig, SFTTrainer

    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Call me Ishmael."}]
    before = snapshot(model)
    arguments = settings(SFTConfig, tmp_path, packing=packing, assistant_only_loss=not packing, max_length=64)
    rows = Dataset.from_list([{"messages": turns}] * 8)
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
    assert changed(model, before)


def test_dpo_prefers(model, tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "Who are you?", "chosen": " Call me Ishmael.", "rejected": " Nobody."}] * 4
    before = snapshot(model)
    trainer = DPOTrainer(
        model, args=settings(DPOConfig, tmp_path), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert trainer.train().training_loss > 0
    assert changed(model, before)


def test_grpo_follows_a_reward(model, tokenizer, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    before = snapshot(model)
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **kwargs: [float(text.count("e")) for text in completions],
        args=settings(GRPOConfig, tmp_path, num_generations=2, max_completion_length=8, learning_rate=1e-2),
        train_dataset=Dataset.from_list([{"prompt": "The white whale"}] * 4),
        processing_class=tokenizer,
    )
    trainer.train()
    assert changed(model, before)


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({}, "embed_tokens"),
        ({"embedding_multiplier": 3.0}, "embed_tokens"),
        ({"tie_word_embeddings": False}, "embed_tokens"),
        ({"position_embedding_type": "learned"}, "embed_positions"),
        ({"embedding_multiplier": 3.0}, "trainable tokens"),
        ({"tie_word_embeddings": False}, "trainable tokens"),
        ({}, None),
    ],
)
def test_embeddings_are_adapted_saved_and_merged(tokenizer, tmp_path, changes, targets):
    from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model

    def load():
        return HfLmForCausalLM.from_pretrained(tmp_path / "model").eval()

    save_small_model(tmp_path / "model", tokenizer, zero_init_residual=False, initializer_range=0.2, **changes)
    ids, base = torch.randint(3, 400, (2, 12)), load()
    before = base(ids).logits
    if targets == "trainable tokens":
        config = TrainableTokensConfig(token_indices=ids[0, :4].tolist())
    else:
        config = LoraConfig(target_modules=targets and [targets], r=4)
    adapted = get_peft_model(base, config)
    torch.testing.assert_close(adapted.eval()(ids).logits, before)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
    expected = adapted(ids).logits
    assert not torch.allclose(expected, before)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, expected)
    if targets == "embed_tokens" and base.config.tie_word_embeddings:
        untie(again)  # as `hf-lm merge` does: PEFT would merge into the head as well, with any tied model
    torch.testing.assert_close(again.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)
