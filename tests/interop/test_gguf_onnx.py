"""GGUF and ONNX files compute what the model computes."""

import copy
import json
import os

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_lm import HfLmConfig, HfLmForCausalLM, HfLmForSequenceClassification
from hf_lm.cli import main
from hf_lm.interop.gguf import export_gguf
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


def test_gguf_is_one_file_where_the_name_says_so(checkpoint, tmp_path, capsys):
    source, file = str(checkpoint("qwen3", head_dim=16)), tmp_path / "v1.5.gguf"
    before = set(tmp_path.iterdir())
    assert main(["export", source, str(file)]) == 0
    assert "gguf" in capsys.readouterr().out
    report, modelfile = tmp_path / "v1.5.parity.json", tmp_path / "v1.5.Modelfile"
    assert set(tmp_path.iterdir()) - before == {file, report, modelfile} and file.stat().st_size > 1000
    assert json.loads(report.read_text())["top1_agreement"] == 1.0
    assert GGUFReader(file).fields["general.name"].contents() == "v1.5"
    assert main(["export", source, str(file), "--to", "gguf"]) == 2
    assert f"{file}: exists already; name a new file" in capsys.readouterr().err
    # transformers takes 128 for the width of a Qwen 3 head, whatever the file says
    assert main(["import", str(file), str(tmp_path / "ours")]) == 0
    assert HfLmForCausalLM.from_pretrained(tmp_path / "ours").config.head_dim == 16
    assert HfLmConfig.from_pretrained(tmp_path, gguf_file="v1.5.gguf").head_dim == 16


def test_gguf_holds_all_chat_templates_and_all_ends(checkpoint, tokenizer, tmp_path, capsys):
    source = checkpoint()
    GenerationConfig(bos_token_id=0, eos_token_id=[40, 1]).save_pretrained(source)
    several = copy.copy(tokenizer)
    several.chat_template = {"default": tokenizer.chat_template, "tool_use": "tools {{ messages }}"}
    several.save_pretrained(source)
    export_gguf(str(source), tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == "tools {{ messages }}"
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot")] == [1, 40]
    GenerationConfig(eos_token_id=[40, 41, 42, 1]).save_pretrained(source)
    assert main(["export", str(source), str(tmp_path / "more.gguf")]) == 2
    assert "up to three tokens that end a text, got [40, 41, 42, 1]" in capsys.readouterr().err


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


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), [*GGUF_CASES, ("qwen3", {"head_dim": 16})])
def test_gguf_gives_the_same_logits_in_llama_cpp(family, options, checkpoint, tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp")
    source, file = checkpoint(family, **options), tmp_path / "model.gguf"
    export_gguf(str(source), file, "float32")
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = str(file), 64, False, 1
    params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    server = llama_cpp.Server(params)
    text = "Call me Ishmael. Some years ago"
    ids, model = tokenizer(text)["input_ids"], AutoModelForCausalLM.from_pretrained(source)
    expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    # it leaves out what is no whole character
    unfinished = [
        number for number in range(330) if not tokenizer.decode([number], skip_special_tokens=True).isascii()
    ]
    request = {"n_predict": 1, "temperature": 0, "n_probs": 3, "logit_bias": [[n, False] for n in unfinished]}
    for length in (2, 5, len(ids), text):  # the last one is for llama.cpp to split
        prompt = text if length == text else ids[:length]
        answer = server.handle_completions({"prompt": prompt, **request})
        (found,) = answer["choices"][0]["logprobs"]["content"]
        wanted = expected[-1 if length == text else length - 1]
        for token in found["top_logprobs"]:
            assert token["logprob"] == pytest.approx(wanted[token["id"]].item(), abs=0.01)
        assert found["top_logprobs"][0]["id"] == wanted.argmax()


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
