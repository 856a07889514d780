"""The real SmolLM2-135M-Instruct goes in and comes back."""

import json
from pathlib import Path

import pytest
import torch
from helpers.llama_cpp import prompts, tokens
from helpers.real_checkpoint import smollm2_folder, smollm2_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hf_lm import HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.evaluation.text import score_documents
from hf_lm.generation import packed

pytestmark = pytest.mark.slow
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def source():
    return smollm2_folder()


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "ours"
    assert main(["import", str(source), str(folder)]) == 0
    return folder


def chat(folder, tokenizer) -> str:
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return tokenizer.decode(model.generate(**ids, **GREEDY)[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_import_agrees_with_the_original_on_real_text(imported):
    report = json.loads((imported / "parity.json").read_text())
    assert report["max_logit_difference"] <= 1e-3
    assert report["top1_agreement"] == 1.0
    assert report["bits_per_byte"] == pytest.approx(report["reference_bits_per_byte"], abs=1e-6)
    assert report["bits_per_byte"] < 1.5  # measured: 1.37; a model with a wrong layer is far above 2


def test_it_chats_through_its_template(source, imported):
    tokenizer = AutoTokenizer.from_pretrained(imported)
    answer = chat(imported, tokenizer)
    assert "Paris" in answer
    assert answer == chat(source, AutoTokenizer.from_pretrained(source))


@pytest.mark.parametrize("vnni", sorted({False, packed.HAS_VNNI}))
def test_eight_bits_raise_bits_per_byte_by_less_than_one_percent(imported, vnni, monkeypatch):
    monkeypatch.setattr(packed, "HAS_VNNI", vnni)
    text = (Path(__file__).parents[2] / "recipes/moby_dick/data/moby_dick.txt").read_text()[:12_000]
    tokenizer = AutoTokenizer.from_pretrained(imported)
    model = HfLmForCausalLM.from_pretrained(imported, dtype=torch.float32).eval()
    want = score_documents(model, tokenizer, [text], 512).summary()["bits_per_byte"]
    got = score_documents(packed.optimize_for_inference(model, int8=True), tokenizer, [text], 512).summary()
    assert 0 < got["bits_per_byte"] / want - 1 < 0.01  # measured: 0.0061, and 0.0060 without VNNI


def test_it_comes_back_bit_for_bit(source, imported, tmp_path):
    assert main(["export", str(imported), str(tmp_path / "back")]) == 0
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is LlamaForCausalLM
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (source / name).read_text() == (tmp_path / "back" / name).read_text(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_exported_gguf_answers_the_same_in_llama_cpp(imported, dtype, tmp_path):
    llama_cpp = pytest.importorskip("xllamacpp")
    assert main(["export", str(imported), str(tmp_path / "gguf"), "--to", "gguf", "--dtype", dtype]) == 0
    params = llama_cpp.CommonParams()
    params.model.path, params.n_ctx = str(tmp_path / "gguf" / "model.gguf"), 256
    params.warmup, params.cpuparams.n_threads = False, 1
    server = llama_cpp.Server(params)
    tokenizer = AutoTokenizer.from_pretrained(imported)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = server.handle_completions({"prompt": ids, "n_predict": GREEDY["max_new_tokens"], "temperature": 0})
    assert answer["choices"][0]["text"] == chat(imported, tokenizer)


def test_gguf_file_is_read_as_it_is_and_written_again(tmp_path):
    assert main(["import", str(smollm2_gguf()), str(tmp_path / "ours")]) == 0
    report = json.loads((tmp_path / "ours" / "parity.json").read_text())
    assert report["top1_agreement"] == 1.0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "gguf"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    report = json.loads((tmp_path / "gguf" / "parity.json").read_text())
    assert report["same_tokens"]
    assert report["top1_agreement"] == 1.0
    ours = HfLmForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    assert sum(parameter.numel() for parameter in ours.parameters()) == 134_515_008

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "It's 1984,   2 024\n\n\t“Größe” 你好 😀 <|im_start|>user\nWe'LL<|im_end|> "
    system = [{"role": "system", "content": "Be brief. 简短。"}, *QUESTION]
    prompt = tokenizer.apply_chat_template([QUESTION, system], add_generation_prompt=True)["input_ids"]
    for file in (smollm2_gguf(), tmp_path / "gguf" / "model.gguf"):
        assert tokens(file, [text]) == [tokenizer(text)["input_ids"]]
        assert prompts(file, [QUESTION, system]) == prompt
