"""`hf-lm import` and `hf-lm export`: all that belongs to a model comes along, and nothing wrong is left behind."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_lm import HfLmConfig, HfLmForCausalLM, HfLmModel
from hf_lm.cli import main
from hf_lm.interop import parity


def read_json(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_import_takes_tokenizer_template_and_generation_settings_along(checkpoint, tokenizer, tmp_path, capsys):
    source, destination = checkpoint("qwen2"), tmp_path / "ours"
    assert main(["import", str(source), str(destination), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == read_json(destination / "parity.json")
    assert report["max_logit_difference"] <= 1e-4
    assert report["top1_agreement"] == 1.0
    assert report["bits_per_byte"] == pytest.approx(report["reference_bits_per_byte"], abs=1e-5)
    assert report["bits_per_byte"] > 1

    messages = [{"role": "user", "content": "Call me Ishmael."}]
    read = AutoTokenizer.from_pretrained(destination)
    assert read.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert GenerationConfig.from_pretrained(destination).temperature == 0.5
    assert type(AutoModelForCausalLM.from_pretrained(destination)) is HfLmForCausalLM
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "TokenizersBackend"])
def test_tokens_are_those_of_the_tokenizer_file_whatever_its_class_says(name, checkpoint, tmp_path):
    source = checkpoint()
    config = read_json(source / "tokenizer_config.json") | {"tokenizer_class": name}
    del config["backend"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    backend.save(str(source / "tokenizer.json"))
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    text = "Call me 1851, ISHMAEL."
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(text)["input_ids"] == backend.encode(text).ids


def test_export_gives_a_checkpoint_of_the_library(checkpoint, tmp_path, capsys):
    source = checkpoint("gpt2")
    assert main(["import", str(source), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back")]) == 0
    assert "largest logit difference" in capsys.readouterr().out
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is transformers.GPT2LMHeadModel
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "back" / name).read_text() == (source / name).read_text()


def test_written_dtype_is_the_one_asked_for(checkpoint, tmp_path):
    source = str(checkpoint("olmo2"))
    assert main(["import", source, str(tmp_path / "ours"), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "ours" / "model.safetensors").values()} == {torch.bfloat16}
    assert read_json(tmp_path / "ours" / "parity.json")["dtype"] == "bfloat16"


def test_own_text_is_read(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("Loomings.", encoding="utf-8")
    source = str(checkpoint())
    assert main(["import", source, str(tmp_path / "ours"), "--text", str(tmp_path / "text.txt")]) == 0
    assert read_json(tmp_path / "ours" / "parity.json")["bytes"] < 10


def test_import_without_a_tokenizer_compares_all_the_same(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "source")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "ours")]) == 0
    report = read_json(tmp_path / "ours" / "parity.json")
    assert report["tokens"] > 32
    assert report["bits_per_byte"] is None


def test_models_that_differ_leave_no_folder(checkpoint, tmp_path, monkeypatch, capsys):
    source = str(checkpoint())
    monkeypatch.setattr(parity, "LARGEST_DIFFERENCE", -1.0)
    before = sorted(tmp_path.iterdir())
    assert main(["import", source, str(tmp_path / "ours")]) == 1
    assert main(["export", source, str(tmp_path / "native")]) == 1
    assert "differ by up to" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_parity_tells_models_apart():
    with pytest.raises(RuntimeError, match="differ by up to"):
        parity.compare(tiny_model("llama", seed=1), tiny_model("llama", seed=2))


def test_missing_weights_become_random_ones_if_allowed(checkpoint, tmp_path):
    source = checkpoint()
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert main(["import", str(source), str(tmp_path / "ours"), "--allow-missing"]) == 0
    report = read_json(tmp_path / "ours" / "parity.json")
    assert report["random_weights"] == ["model.layers.1.mlp.up_proj.weight"]
    assert "model.layers.1.mlp.up_proj.weight" in load_file(tmp_path / "ours" / "model.safetensors")


def edit_config(**values):
    def damage(folder):
        config = read_json(folder / "config.json") | values
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def overwrite(name, content: bytes):
    def damage(folder):
        (folder / name).write_bytes(content)

    return damage


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def index_outside(folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")


def not_finite(tensors):
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 4] = float("nan")


def too_large(tensors):
    tensors["model.norm.weight"][3] = float("inf")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"
DAMAGES = {
    "unknown model_type": (
        edit_config(model_type="lama"),
        r"'lama' is not one hf_lm reads: llama, .* \(nearest: llama\)",
    ),
    "no model_type": (edit_config(model_type=None), "no model_type"),
    "experts": (edit_config(model_type="mixtral", num_local_experts=8), "'mixtral' is a mixture of experts"),
    "encoder-decoder": (edit_config(model_type="t5", is_encoder_decoder=True), "'t5' is an encoder-decoder model"),
    "vision": (edit_config(model_type="gemma3", vision_config={"a": 1}), "'gemma3' is a vision"),
    "config is no object": (overwrite("config.json", b"5"), "config.json holds no JSON object"),
    "config is no JSON": (overwrite("config.json", b"{"), "not a valid JSON"),
    "missing tensor": (
        edit_weights(lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight")),
        r"missing: model\.layers\.0\.mlp\.down_proj\.weight",
    ),
    "missing head": (edit_weights(lambda tensors: tensors.pop("lm_head.weight")), "missing: lm_head.weight"),
    "extra tensor": (
        edit_weights(lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.ones(48, 32)})),
        r"unexpected: model\.layers\.7\.mlp\.up_proj\.weight",
    ),
    "misshaped tensor": (
        edit_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)})),
        r"another shape: model\.norm\.weight \(33,\) instead of \(32,\)",
    ),
    "one layer too many": (edit_config(num_hidden_layers=4), r"missing: model\.layers\.3\.input_layernorm\.weight"),
    "index outside": (index_outside, r"weight_map names '\.\./elsewhere\.safetensors'"),
    "index of nothing": (index_of_nothing, "needs a weight_map"),
    "git-lfs pointer": (overwrite("model.safetensors", POINTER), "a git-lfs pointer instead of weights"),
    "web page": (overwrite("model.safetensors", b"<!DOCTYPE html><html>"), "a web page"),
    "truncated": (truncate, r"model\.safetensors: \d+ bytes that are no complete safetensors file"),
    "NaN": (edit_weights(not_finite), r"o_proj\.weight holds NaN or infinite"),
    "infinity": (edit_weights(too_large), r"model\.norm\.weight holds NaN or infinite"),
    "tokenizer too large": (
        lambda folder: tiny_model("llama", vocab_size=300).save_pretrained(folder),
        "the tokenizer has 320 tokens, but the embedding only 300",
    ),
    "broken tokenizer": (overwrite("tokenizer.json", b"{}"), r"the tokenizer cannot be read: .*tokenizer\.json: "),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_source_is_one_clear_line_and_leaves_nothing(damage, message, checkpoint, tmp_path, capsys):
    source = checkpoint(tie_word_embeddings=False)
    damage(source)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["import", str(source), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-lm import: ")
    assert re.search(message, error), error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["import", "export"])
@pytest.mark.parametrize("source", ["no/such/folder", "./nothing", "nothing"])
def test_source_that_is_not_there_is_named(command, source, tmp_path, capsys):
    assert main([command, source, str(tmp_path / "new")]) == 2
    assert source in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(checkpoint, tmp_path, capsys):
    source = checkpoint()
    before = (source / "config.json").read_text()
    assert main(["import", str(source), str(source)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (source / "config.json").read_text() == before


def test_model_that_no_family_can_hold_says_why(tiny_model, tmp_path, capsys):
    tiny_model.config.final_logit_softcapping = 15.0
    tiny_model.save_pretrained(tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "native")]) == 2
    assert "nearest is apertus, but for: final_logit_softcapping is 15.0, there None" in capsys.readouterr().err
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_weights_of_an_hf_lm_model_are_an_error(name, tiny_config, tmp_path):
    tiny_config.tie_word_embeddings = False
    HfLmForCausalLM(tiny_config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}"):
        HfLmForCausalLM.from_pretrained(tmp_path)
    HfLmForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_language_model_may_start_from_a_base_model(tiny_config, tmp_path):
    tiny_config.tie_word_embeddings = False
    HfLmModel(tiny_config).save_pretrained(tmp_path)
    HfLmForCausalLM.from_pretrained(tmp_path)


def test_from_scratch_config_is_not_taken_for_a_foreign_one(tiny_config, tmp_path):
    tiny_config.save_pretrained(tmp_path)
    assert HfLmConfig.from_pretrained(tmp_path).to_dict() == tiny_config.to_dict()
