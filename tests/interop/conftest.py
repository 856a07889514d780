"""Checkpoints of other families, with a tokenizer."""

from pathlib import Path

import pytest
from tiny_families import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hf_lm.interop.parity import default_text

TEMPLATE = "{% for message in messages %}<|bos|>{{ message['role'] }}: {{ message['content'] }}<|eos|>{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 320 tokens, trained on the text that the parity check reads."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([default_text()], trainer)
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """`checkpoint(family, **options)`: the folder of a tiny model, complete with tokenizer and chat template."""

    def make(family: str = "llama", name: str = "source", vocab_size: int = 330, **options) -> Path:
        model = tiny_model(family, vocab_size=vocab_size, **options)
        model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, temperature=0.5, do_sample=True)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
