"""GGUF and ONNX files compute what the model computes."""

import importlib.util
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lm import HfLmConfig, HfLmForCausalLM, HfLmForSequenceClassification
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.interop.gguf import export_gguf, gguf_family, pre_tokenizer_name
from hf_lm.interop.parity import default_text

# the options of each architecture that a GGUF file holds
GGUF_CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 128}),
]


@pytest.mark.parametrize(
    ("family", "options", "dtype"),
    [(*case, "float32") for case in GGUF_CASES]
    + [(*GGUF_CASES[0], dtype) for dtype in ("float16", "bfloat16", "q8_0")],
)
def test_gguf_gives_the_same_tokens_in_the_library(family, options, dtype, checkpoint, tokenizer, tmp_path, capsys):
    source, destination = checkpoint(family, **options), tmp_path / "gguf"
    assert main(["export", str(source), str(destination), "--to", "gguf", "--dtype", dtype, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["top1_agreement"] == 1.0
    assert report["max_logit_difference"] <= 1e-5
    assert report["same_tokens"]

    read = AutoTokenizer.from_pretrained(destination, gguf_file="model.gguf")
    assert read.chat_template == tokenizer.chat_template
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    ids = torch.tensor([tokenizer("Call me Ishmael.")["input_ids"]])
    original = AutoModelForCausalLM.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(destination, gguf_file="model.gguf", dtype=torch.float32)
    if dtype == "float32":
        settings = {"max_new_tokens": 16, "do_sample": False}
        assert torch.equal(model.generate(ids, **settings), original.generate(ids, **settings))


def test_gguf_file_becomes_an_hf_lm_model(checkpoint, tokenizer, tmp_path):
    source = checkpoint("llama")
    export_gguf(str(source), tmp_path / "gguf")
    original = HfLmForCausalLM.from_pretrained(source)
    read = HfLmForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in original.state_dict().items())
    read.save_pretrained(tmp_path / "saved")  # the library's own GGUF models refuse this
    classifier = HfLmForSequenceClassification.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf", num_labels=3)
    assert torch.equal(classifier.model.embed_tokens.weight, original.model.embed_tokens.weight)

    assert main(["import", str(tmp_path / "gguf" / "model.gguf"), str(tmp_path / "ours")]) == 0
    again = HfLmForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in original.state_dict().items())
    text = default_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True, "attention_out_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "rope_type 'linear'"),
        ({"norm_position": "post"}, "No family of native checkpoints"),
        ({"norm_type": "layernorm", "norm_bias": True}, "this one is of stablelm"),
    ],
)
def test_gguf_names_the_options_it_cannot_hold(options, message):
    llama = {"qk_norm": None, "mlp_type": "gated", "hidden_act": "silu"}
    with pytest.raises(InputError, match=message):
        gguf_family(HfLmConfig(**(llama | options)))


def test_gguf_names_the_tokenizer_it_cannot_hold():
    with pytest.raises(InputError, match="WordLevel with Whitespace"):
        pre_tokenizer_name({"model": {"type": "WordLevel"}, "pre_tokenizer": {"type": "Whitespace"}})


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize(("family", "options"), [case for case in GGUF_CASES if case[1].get("head_dim") != 12])
def test_gguf_gives_the_same_tokens_in_llama_cpp(family, options, checkpoint, tokenizer, tmp_path):
    import llama_cpp

    source = checkpoint(family, **options)
    export_gguf(str(source), tmp_path / "gguf", "float32")
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "logits_all": True}
    file = str(tmp_path / "gguf" / "model.gguf")
    program = llama_cpp.Llama(file, n_ctx=64, n_threads=1, verbose=False, **exact)
    text = "Call me Ishmael. Some years ago"
    ids = tokenizer(text)["input_ids"]
    assert program.tokenize(text.encode(), add_bos=False) == ids

    model = AutoModelForCausalLM.from_pretrained(source)
    program.eval(ids)
    logits = torch.from_numpy(program.scores[: len(ids)].copy())
    torch.testing.assert_close(logits, model(torch.tensor([ids])).logits[0], rtol=0, atol=1e-4)
    generated = program.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
    greedy = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    assert [next(generated) for _ in range(16)] == greedy[0, len(ids) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["from_scratch", "llama", "gpt2", "gemma3_text", "phi"])
def test_onnx_gives_the_same_logits(source, checkpoint, tiny_model, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "source"
    if source == "from_scratch":
        tiny_model.save_pretrained(folder)
    else:
        checkpoint(source)
    assert main(["export", str(folder), str(tmp_path / "onnx"), "--to", "onnx", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_logit_difference"] <= 1e-4
    assert report["top1_agreement"] == 1.0

    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(tmp_path / "onnx" / "model.onnx"))
    ids = torch.arange(3 * 11).reshape(3, 11) % 90
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    (logits, *_) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    expected = HfLmForCausalLM.from_pretrained(folder)(ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.from_numpy(logits)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)


def test_onnx_writes_float32_only(checkpoint, tmp_path, capsys):
    source = str(checkpoint())
    assert main(["export", source, str(tmp_path / "onnx"), "--to", "onnx", "--dtype", "bfloat16"]) == 2
    assert main(["export", source, str(tmp_path / "native"), "--dtype", "q8_0"]) == 2
    assert "float32 only" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()
