"""A finished model folder, and the emulated Hub, for the tests in this folder."""

import json
import shutil

import pytest
import torch
from hub_server.fixtures import client, hub, hub_server, lfs_client_process, xet_client, xet_client_process  # noqa: F401
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.hub.card import write_card

METRICS = {
    "bits_per_byte": 2.1234567,
    "bits_per_byte_interval": [2.05, 2.2],
    "perplexity": 30.5,
    "eval_loss": 3.4177,
    "train_loss": 3.3,
    "train_tokens": 100_000,
    "train_seconds": 12.5,
    "train_tokens_per_second": 8000.0,
    "peak_memory_bytes": 2**29,
    "hardware": "x86_64, 2 threads",
    "data": {"train_file": "/home/somebody/novel.txt", "sha256": "ab" * 32, "license": "public domain"},
    "seed": 7,
    "steps": 10,
    "versions": {"torch": "2.13.0"},
    "git_revision": "0123abc",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory):
    """What a training run leaves; not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = byte_tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    model = HfLmForCausalLM(
        HfLmConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            zero_init_residual=False,
            initializer_range=0.2,
            **special,
        )
    )
    model.generation_config = GenerationConfig(max_new_tokens=8, **special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "metrics.json").write_text(json.dumps(METRICS))
    write_card(folder, license="mit", text_language="en")
    return folder


@pytest.fixture
def model_folder(finished_folder, tmp_path):
    """A copy of `finished_folder` to change."""
    return shutil.copytree(finished_folder, tmp_path / "tiny")
