"""Foreign checkpoints load as they are, are saved as hf_lm models, and come back bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import CASES, OPTIONS, case_name, tiny_config, tiny_model

from hf_lm import HfLmConfig, HfLmForCausalLM, HfLmForSequenceClassification, HfLmForTokenClassification, HfLmModel
from hf_lm.errors import InputError
from hf_lm.interop.convert import to_native
from hf_lm.interop.families import FAMILIES, choose_family

# values of a configuration that say how it was written, or how a dropped default was once worked out
NOT_COMPARED = ("no_rope_layer_interval", "sliding_window_pattern", "_sliding_window_pattern", "summary_first_dropout")


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_values(folder) -> dict:
    values = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in values.items() if name not in NOT_COMPARED}


def assert_equal_tensors(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


ROUND_TRIPS = [(*case, "float32", "1GB") for case in CASES] + [
    (family, options[0] | {"tie_word_embeddings": tied}, "bfloat16", "20KB")
    for family, options in OPTIONS.items()
    for tied in (True, False)
]


@pytest.mark.parametrize(("family", "options", "dtype", "shard"), ROUND_TRIPS, ids=case_name)
def test_checkpoint_comes_back_bit_for_bit(family, options, dtype, shard, tmp_path):
    native = tiny_model(family, **options).to(getattr(torch, dtype))
    native.save_pretrained(tmp_path / "source", max_shard_size=shard)
    assert (tmp_path / "source" / "model.safetensors.index.json").exists() == (shard == "20KB")

    ours = HfLmForCausalLM.from_pretrained(tmp_path / "source")
    assert ours.dtype == native.dtype
    ours.save_pretrained(tmp_path / "ours")
    again = HfLmForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal_tensors(ours.state_dict(), again.state_dict())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "hf_lm"
    assert weights(tmp_path / "ours").keys() <= set(HfLmForCausalLM(ours.config).state_dict())

    to_native(again, family).save_pretrained(tmp_path / "back")
    assert_equal_tensors(weights(tmp_path / "source"), weights(tmp_path / "back"))
    assert config_values(tmp_path / "source") == config_values(tmp_path / "back")


@pytest.mark.parametrize("family", FAMILIES)
def test_config_alone_reads_a_foreign_folder(family, tmp_path):
    tiny_config(family).save_pretrained(tmp_path)
    config = HfLmConfig.from_pretrained(tmp_path, attention_dropout=0.25)
    assert config.model_type == "hf_lm"
    assert (config.hidden_size, config.num_hidden_layers, config.attention_dropout) == (32, 3, 0.25)
    assert choose_family(config, family).model_type == family
    assert HfLmConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi"])
def test_heads_start_from_a_foreign_backbone(family, tmp_path):
    tiny_model(family, tie_word_embeddings=False).save_pretrained(tmp_path)
    language_model = HfLmForCausalLM.from_pretrained(tmp_path)
    classifier = HfLmForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    tagger = HfLmForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    backbone = HfLmModel.from_pretrained(tmp_path)
    assert classifier.score.weight.shape == (2, 32)
    assert tagger.config.num_labels == 5
    assert_equal_tensors(language_model.model.state_dict(), classifier.model.state_dict())
    assert_equal_tensors(language_model.model.state_dict(), tagger.model.state_dict())
    assert_equal_tensors(language_model.model.state_dict(), backbone.state_dict())


def test_file_of_a_base_model_with_stale_buffers_loads(tmp_path):
    """As the original GPT-2 is published: no `transformer.` in front, and the causal mask among the weights."""
    native = tiny_model("gpt2")
    native.transformer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(3)}
    save_file(tensors | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.arange(10)[None]
    ours = HfLmForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(ids).logits, native(ids).logits, rtol=0, atol=1e-5)


def test_pythia_head_loads_under_its_published_name(tmp_path):
    native = tiny_model("gpt_neox", tie_word_embeddings=False)
    native.save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    assert torch.equal(HfLmForCausalLM.from_pretrained(tmp_path).lm_head.weight, native.lm_head.weight)


def test_dtype_and_device_map_are_honoured(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    model = HfLmForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, device_map={"": "cpu"})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_weights_on_disk_are_offloaded_in_our_layout(tmp_path):
    native = tiny_model("gpt2")
    native.save_pretrained(tmp_path / "source")
    device_map = {"model.embed_tokens": "cpu", "model.embed_positions": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = HfLmForCausalLM.from_pretrained(
        tmp_path / "source", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    ids = torch.arange(10)[None]
    torch.testing.assert_close(model(ids).logits, native(ids).logits, rtol=0, atol=1e-5)


def test_model_from_scratch_is_saved_in_our_layout(tiny_model, tmp_path):
    """The registered conversions must not touch what was never foreign."""
    tiny_model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tiny_model.state_dict()) - {"lm_head.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_export_chooses_the_family_by_the_options(family):
    for options in (options for name, options in CASES if name == family):
        config = HfLmConfig(**FAMILIES[family].to_hf_lm(tiny_config(family, **options)))
        chosen = choose_family(config).model_type
        # a Mistral without a window is a Llama
        expected = "llama" if family == "mistral" and options["sliding_window"] is None else family
        assert chosen == expected


def test_export_names_the_options_that_no_family_has(tiny_config):
    tiny_config.norm_position = "sandwich"
    with pytest.raises(InputError, match=r"nearest is apertus, but for: norm_position is 'sandwich', there 'pre'"):
        choose_family(tiny_config)


@pytest.mark.parametrize(
    ("family", "option"),
    [
        ("cohere", "use_qk_norm"),
        ("stablelm", "qk_layernorm"),
        ("phi", "qk_layernorm"),
        ("gpt2", "scale_attn_by_inverse_layer_idx"),
        ("gpt2", "add_cross_attention"),
        ("gemma2", "use_bidirectional_attention"),
        ("gemma3_text", "use_bidirectional_attention"),
    ],
)
def test_option_that_the_decoder_lacks_is_refused_by_name(family, option, tmp_path):
    config_class = transformers.CONFIG_MAPPING[family]
    config_class(**{option: True}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=option):
        HfLmConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("pad_token_id", [-1, 10_000])
def test_padding_outside_the_vocabulary_means_none(pad_token_id, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": pad_token_id}))
    assert HfLmForCausalLM.from_pretrained(tmp_path).config.pad_token_id is None


def test_config_of_a_foreign_checkpoint_is_read_once(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    code = """
import sys
from hf_lm import HfLmForCausalLM
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
HfLmForCausalLM.from_pretrained(sys.argv[1])
print(sum(name.endswith("/config.json") for name in opened))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
