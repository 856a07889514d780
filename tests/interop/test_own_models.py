"""Models trained here from scratch, as checkpoints that run without any code of ours."""

import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.models import book_tokenizer, save_small_model, small_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.interop.convert import to_native
from hf_lm.interop.elsewhere import where_it_runs
from hf_lm.interop.families import choose_family

CONSTANTS = {"alpha_p": [0.541324854612918], "alpha_n": [-1000.0], "beta": 0.0, "eps": -1e-6}


def logits_of(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def draw(vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported_run(small_run, tmp_path_factory):
    """The run of the small recipe, trained with the defaults, and what `hf-lm export` makes of it."""
    folder = tmp_path_factory.mktemp("exported") / "native"
    assert main(["export", str(small_run[0]), str(folder)]) == 0
    return small_run[0], folder


def test_trained_model_is_an_apertus_with_the_same_logits(exported_run):
    run, native = exported_run
    theirs, ours = AutoModelForCausalLM.from_pretrained(native), HfLmForCausalLM.from_pretrained(run)
    assert type(theirs) is transformers.ApertusForCausalLM
    assert theirs.config.hidden_act == "xielu"
    ids = draw(ours.config.vocab_size)
    assert (logits_of(theirs, ids) - logits_of(ours, ids)).abs().max() <= 1e-6
    assert json.loads((native / "parity.json").read_text())["max_logit_difference"] <= 1e-6


WITHOUT_HF_LM = """
import json, sys
sys.modules["hf_lm"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from lm_eval.models.huggingface import HFLM
from lm_eval.api.instance import Instance

folder, text = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(input_ids=ids).logits[0, -1].tolist()
written = pipeline("text-generation", folder)(text, max_new_tokens=8, do_sample=False)[0]["generated_text"]
scorer = HFLM(pretrained=folder, device="cpu", batch_size=1)
asked = Instance(request_type="loglikelihood", doc={}, arguments=(text, " me Ishmael"), idx=0)
likelihood, _ = scorer.loglikelihood([asked], disable_tqdm=True)[0]
print(json.dumps({"logits": logits, "written": written, "likelihood": likelihood}))
"""


def test_exported_run_works_where_hf_lm_is_not_installed(exported_run, tmp_path):
    """With transformers' pipeline and lm-eval, and without trusting remote code."""
    run, native = exported_run
    pytest.importorskip("lm_eval")
    command = [sys.executable, "-c", WITHOUT_HF_LM, str(native), "Call me"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    model = HfLmForCausalLM.from_pretrained(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    ids = tokenizer("Call me", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits_of(model, ids)[0, -1], rtol=0, atol=1e-6)
    written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert found["written"] == tokenizer.decode(written[0], skip_special_tokens=True)
    assert found["likelihood"] < 0


def test_exported_run_passes_the_doctor(exported_run, capsys):
    assert main(["doctor", str(exported_run[1])]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_constants_of_the_activation_are_written_in_float32(dtype, tmp_path):
    source = save_small_model(tmp_path / "ours", book_tokenizer())
    assert main(["export", source, str(tmp_path / "native"), "--dtype", dtype]) == 0
    tensors = load_file(tmp_path / "native" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == getattr(torch, dtype)
    for layer in range(2):
        for name, value in CONSTANTS.items():
            written = tensors[f"model.layers.{layer}.mlp.act_fn.{name}"]
            assert written.dtype == torch.float32
            assert torch.equal(written, torch.tensor(value))
    read = HfLmForCausalLM.from_pretrained(tmp_path / "native")
    assert (read.dtype, read.config.hidden_act) == (getattr(torch, dtype), "relu2")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    ids = draw(read.config.vocab_size)
    torch.testing.assert_close(logits_of(read, ids), logits_of(theirs, ids), rtol=0.02, atol=0.02)


def test_apertus_with_plain_squared_relu_is_read(tmp_path):
    native = to_native(small_model(book_tokenizer()))
    config = native.config
    config.hidden_act = "relu2"
    plain = transformers.ApertusForCausalLM(config).eval()
    plain.load_state_dict({name: one for name, one in native.state_dict().items() if "act_fn" not in name})
    plain.save_pretrained(tmp_path)
    ids = draw(config.vocab_size)
    assert torch.equal(logits_of(HfLmForCausalLM.from_pretrained(tmp_path), ids), logits_of(plain, ids))


@pytest.mark.parametrize(("name", "value"), [("alpha_p", [0.8]), ("beta", 0.5), ("eps", None)])
def test_apertus_with_learned_factors_is_refused_by_name(name, value, tmp_path):
    to_native(small_model(book_tokenizer())).save_pretrained(tmp_path)
    tensors, key = load_file(tmp_path / "model.safetensors"), f"model.layers.1.mlp.act_fn.{name}"
    del tensors[key]
    added = {} if value is None else {key: torch.tensor(value)}
    save_file(tensors | added, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = "missing" if value is None else torch.tensor(value).item()
    with pytest.raises(InputError, match=rf"model\.layers\.1\.mlp\.act_fn has .*{name} {found:.1}.*squared ReLU"):
        HfLmForCausalLM.from_pretrained(tmp_path)


def test_model_without_norms_of_queries_and_keys_is_an_arcee():
    ours = small_model(book_tokenizer(), qk_norm=None)
    native, ids = to_native(ours), draw(ours.config.vocab_size)
    assert type(native) is transformers.ArceeForCausalLM
    assert (logits_of(native, ids) - logits_of(ours, ids)).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_scaled_embedding_is_folded_into_untied_weights(tied, dtype, tmp_path):
    source = save_small_model(tmp_path / "ours", book_tokenizer(), embedding_multiplier=11.3, tie_word_embeddings=tied)
    assert main(["export", source, str(tmp_path / "native"), "--dtype", dtype]) == 0
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    ours = HfLmForCausalLM.from_pretrained(source, dtype=native.dtype)
    assert (type(native), native.config.tie_word_embeddings) == (transformers.ApertusForCausalLM, False)
    assert torch.equal(native.lm_head.weight, ours.lm_head.weight)
    ids = draw(ours.config.vocab_size)
    assert torch.equal(native.get_input_embeddings()(ids), ours.get_input_embeddings()(ids))
    if dtype == "float32":
        assert (logits_of(native, ids) - logits_of(ours, ids)).abs().max() <= 1e-6


def test_family_with_a_factor_for_scaled_embeddings_comes_first():
    options = {"mlp_type": "gated", "hidden_act": "silu", "qk_norm": None, "embedding_multiplier": 12.0}
    assert choose_family(HfLmConfig(**options)).model_type == "granite"


@pytest.mark.parametrize("option", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_soft_cap_is_refused_by_name(option):
    config = HfLmConfig(**{option: 15.0, "embedding_multiplier": 11.3})
    with pytest.raises(InputError, match=rf"nearest is apertus, but for: {option} is 15\.0, there None\.$"):
        choose_family(config)


def test_train_ends_by_naming_where_the_model_runs(recipe, tmp_path, capsys):
    assert main(["train", recipe(max_steps=2, eval_strategy="no", save_strategy="no", sample_prompts=None)]) == 0
    run = tmp_path / "run"
    _, line, in_gguf, *_ = capsys.readouterr().out.splitlines()
    assert in_gguf == f"Runs without hf_lm in llama.cpp and Ollama as GGUF of apertus: hf-lm export {run} {run}.gguf"
    assert line == (
        f"Runs without hf_lm in transformers and vLLM as ApertusForCausalLM: hf-lm export {run} {run}-native"
    )
    assert main(line.partition(": hf-lm ")[2].split()) == 0


@pytest.mark.parametrize(
    ("options", "head", "expected"),
    [
        ({"final_logit_softcapping": 15.0}, "CausalLM", "with hf_lm only: .* final_logit_softcapping is 15.0, there None"),
        ({"hidden_act": "gelu"}, "CausalLM", "without hf_lm in transformers as ApertusForCausalLM: hf-lm export"),
        ({"mlp_type": "gated"}, "TokenClassification", "in transformers as Qwen3ForTokenClassification: hf-lm export"),
        ({}, "SequenceClassification", "with hf_lm only: .* a class for a text classifier"),
    ],
)  # fmt: skip
def test_what_is_in_the_way_elsewhere_is_said(options, head, expected, tmp_path):
    config = HfLmConfig(**options)
    config.architectures = [f"HfLmFor{head}"]
    config.save_pretrained(tmp_path)
    assert re.search(expected, where_it_runs(tmp_path))


def test_adapters_and_native_models_are_told_apart(tmp_path):
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert where_it_runs(tmp_path) == "Runs without hf_lm as it is: LlamaForCausalLM of transformers"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert f"hf-lm merge {tmp_path} {tmp_path}-merged" in where_it_runs(tmp_path)
