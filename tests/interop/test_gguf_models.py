"""GGUF files of every family: what they say, and that stock llama.cpp computes with them what the model computes."""

import json
import math

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, GGUFReader, GGUFWriter, LlamaFileType
from tiny_families import MHA, tiny_config

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.errors import Failure, InputError
from hf_lm.interop import gguf, gguf_models, llama_cpp
from hf_lm.interop.families import FAMILIES, read_config
from hf_lm.interop.gguf_models import MODELS, gguf_model

LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4} | TIED
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 1.5,
}
# family, options, and keys of the file (after the architecture's name) with their values
CASES = [
    ("llama", UNTIED, {"rope.dimension_count": 8}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}, {"attention.key_length": 12}),
    ("llama", {"rope_parameters": LLAMA3}, {"rope.scaling.type": None}),
    ("llama", {"rope_parameters": LINEAR}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    (
        "llama",
        {"rope_parameters": YARN},
        {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": 1.0},
    ),
    (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.5}},
        {"rope.scaling.attn_factor": 1.5 / (0.1 * math.log(4) + 1)},
    ),
    ("mistral", {"sliding_window": 60}, {"context_length": 60, "attention.sliding_window": None}),
    ("qwen2", TIED, {"attention.layer_norm_rms_epsilon": 1e-6}),
    ("qwen2", {"rope_parameters": YARN} | UNTIED, {"rope.scaling.type": "yarn"}),
    ("qwen3", {"head_dim": 16}, {"attention.key_length": 16}),
    ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}, {"block_count": 5}),
    ("olmo2", UNTIED, {"attention.head_count_kv": 2}),
    ("olmo2", MHA | TIED, {"attention.head_count_kv": 4}),
    (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 5.0},
        {"attention.sliding_window": 4, "attention.sliding_window_pattern": 2, "attn_logit_softcapping": 5.0},
    ),
    (
        "gemma3_text",
        GEMMA | {"sliding_window_pattern": 2, "final_logit_softcapping": 20.0},
        {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 10000.0, "final_logit_softcapping": 20.0},
    ),
    ("gemma3_text", GEMMA | {"layer_types": ["full_attention"] * 3}, {"attention.sliding_window_pattern": 1}),
    ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention"] * 3}, {"attention.sliding_window_pattern": 4}),
    (
        "gemma3_text",
        GEMMA
        | {"sliding_window_pattern": 3}
        | {
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
        {"rope.freq_base": 500.0, "rope.freq_base_swa": 100.0, "rope.scaling.factor": 4.0},
    ),
    (
        "granite",
        GRANITE,
        {"logit_scale": 1.5, "embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.2},
    ),
    ("granite", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3} | MHA, {"logit_scale": 1.0}),
    ("cohere", {"logit_scale": 2.0} | TIED, {"logit_scale": 2.0, "attention.layer_norm_epsilon": 1e-5}),
    ("stablelm", UNTIED, {"rope.dimension_count": 2}),
    ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5} | TIED, {"rope.dimension_count": 4}),
    ("stablelm", {"use_parallel_residual": True}, {}),
    ("phi", UNTIED, {"rope.dimension_count": 4}),
    ("phi", {"hidden_act": "gelu"} | TIED, {}),
    ("starcoder2", TIED, {}),
    ("starcoder2", {"use_bias": False} | MHA | UNTIED, {"attention.head_count_kv": 4}),
    ("gpt_neox", {"hidden_act": "gelu_new"} | UNTIED, {"use_parallel_residual": True, "rope.dimension_count": 2}),
    ("gpt_neox", {"attention_bias": False, "rotary_pct": 0.5} | TIED, {"rope.dimension_count": 4}),
    ("gpt_neox", {"use_parallel_residual": False}, {"use_parallel_residual": False}),
    ("gpt2", TIED, {"context_length": 64, "feed_forward_length": 128, "rope.freq_base": None}),
    ("gpt2", {"n_inner": 40, "activation_function": "gelu"} | UNTIED, {"feed_forward_length": 40}),
    ("apertus", TIED, {"xielu.beta": [0.0] * 3, "xielu.alpha_p": [0.541324854612918] * 3}),
    ("apertus", {"attention_bias": True, "rope_parameters": LLAMA3} | UNTIED, {"xielu.alpha_n": [-1000.0] * 3}),
    ("arcee", TIED, {}),
    ("arcee", {"head_dim": 12} | UNTIED, {"rope.dimension_count": 12}),
]
CASES = [(family, {"rope_parameters": None} | options, keys) for family, options, keys in CASES]
NAMES = [f"{family}-{number}" for number, (family, *_) in enumerate(CASES)]
WITH_GELU = ("gemma2", "gemma3_text", "phi", "starcoder2", "gpt_neox", "gpt2")
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "stablelm", "starcoder2")  # with the defaults of their options


def model_of(family: str, options: dict, seed: int = 0) -> HfLmForCausalLM:
    """A tiny random model whose layers say more than its embedding, and whose most likely token stands out."""
    given = {key: value for key, value in options.items() if value is not None}
    config = HfLmConfig(**read_config(tiny_config(family, vocab_size=330, **given).to_dict(), family))
    model, generator = HfLmForCausalLM(config), torch.Generator().manual_seed(seed)
    loud = ["o_proj.weight", "down_proj.weight", "model.norm.weight"]
    if config.norm_position != "pre":
        loud += ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = name.endswith("norm.weight")
            centre = 1.0 if is_norm else 0.0
            noise = torch.randn(weight.shape, generator=generator) * (0.3 if is_norm else 0.2)
            scale = 4 if name.endswith(tuple(loud)) else 1
            weight.copy_((centre + noise) * scale - (centre if config.norm_offset else 0.0))
    return model.eval()


def write(model: HfLmForCausalLM, tokenizer) -> tuple[list[int], list[int]]:
    """A prompt and the 40 most likely tokens after it, one after the other."""
    prompt = tokenizer("Call me Ishmael.")["input_ids"]
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    ids = model.generate(torch.tensor([prompt]), **settings, suppress_tokens=tokenizer.all_special_ids)
    return prompt, ids[0, len(prompt) :].tolist()


def is_lively(model: HfLmForCausalLM, tokenizer) -> bool:
    """Whether a model writes five different tokens or more, and rounding does not decide which."""
    prompt, written = write(model, tokenizer)
    with torch.no_grad():
        best = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
    best[:, tokenizer.all_special_ids] = -torch.inf
    first, second = best.topk(2).values.unbind(1)
    return len(set(written)) >= 5 and bool((first - second).min() > 0.1)


@pytest.fixture
def lively(tokenizer, tmp_path):
    """`lively(family, **options)`: the folder of the first `model_of` it that is lively, with a tokenizer."""

    def make(family: str, **options) -> str:
        folder = tmp_path / "lively"
        models = (model_of(family, options, seed) for seed in range(500))
        next(model for model in models if is_lively(model, tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def contents(reader: GGUFReader, key: str):
    field = reader.fields.get(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize(("family", "options", "keys"), CASES, ids=NAMES)
def test_files_say_what_llama_cpp_needs(family, options, keys, tmp_path):
    model = model_of(family, options)
    row, config = gguf_model(model.config), model.config
    writer = GGUFWriter(tmp_path / "model.gguf", row.architecture)
    gguf_models.add_config(writer, row, config, LlamaFileType.ALL_F32, "tiny")
    gguf_models.add_tensors(writer, row, model, "float32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    reader = GGUFReader(tmp_path / "model.gguf")
    full = {key: key if key.startswith("xielu") else f"{row.architecture}.{key}" for key in keys}
    assert {key: pytest.approx(contents(reader, full[key])) for key in keys} == keys
    names = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    (architecture,) = [key for key, name in MODEL_ARCH_NAMES.items() if name == row.architecture]
    known = {TENSOR_NAMES[tensor] for tensor in MODEL_TENSORS[architecture]} | {"rope_freqs"}
    for name in names:
        parts = name.rpartition(".")[0].split(".")
        assert ".".join("{bid}" if part.isdigit() else part for part in parts) in known
    assert ("output.weight" in names) == (row.head == "required" or not config.tie_word_embeddings)
    has_factors = (config.rope_parameters or {}).get("rope_type") == "llama3"  # so Apertus' default is
    assert ("rope_freqs.weight" in names) == has_factors
    if has_factors:
        assert names["rope_freqs.weight"] == (config.head_dim // 2,)


@pytest.mark.parametrize("family", [*READ_BY_TRANSFORMERS, "olmo2", "gemma2"])
def test_transformers_is_the_judge_where_it_reads_the_whole_model(family, lively, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    options = next(options for name, options, _ in CASES if name == family)
    report = gguf.export_gguf(lively(family, **options), tmp_path / "model.gguf", "float32")
    if family in READ_BY_TRANSFORMERS:
        assert report["judge"] == "transformers" and report["same_tokens"]
        assert report["max_logit_difference"] <= 1e-4
    else:  # nothing is said of what nobody read
        assert report["judge"] is None
        assert not {"same_tokens", "top1_agreement", "max_logit_difference"} & set(report)


def test_every_family_has_a_case():
    assert {row.family for row in MODELS} == {family for family, _, _ in CASES}
    assert {row.family for row in MODELS} <= set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama.cpp's llama lacks .*hidden_act is 'gelu', there 'silu'"),
        ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "rope_type is 'dynamic', there 'default or"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast is 16, there 32"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type is 'llama3'"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, there False"),
        ("smollm3", {"no_rope_layers": [1, 0, 0]}, r"no_rope_layers is \[1, 0, 0\], there \[1, 1, 1\]"),
        ("olmo2", {"attention_bias": True}, "attention_bias is True"),
        ("gemma2", GEMMA | UNTIED, "tie_word_embeddings is False, there True"),
        ("gemma2", GEMMA | {"attn_logit_softcapping": None}, "attn_logit_softcapping is None, there 'a number'"),
        ("gemma2", GEMMA | {"query_pre_attn_scalar": 24}, "attention_multiplier is 0.204.*, there 0.25"),
        ("gemma3_text", GEMMA | {"layer_types": ["full_attention"] + ["sliding_attention"] * 2}, "layer_types is "),
        (
            "gemma3_text",
            GEMMA | {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), LINEAR)},
            "rope_type of the sliding layers is 'linear', there 'default'",
        ),
        ("cohere", UNTIED, "command-r lacks .*tie_word_embeddings is False"),
        ("gpt2", {"scale_attn_weights": False}, "attention_multiplier is 1.0"),
        ("arcee", {"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_options_that_llama_cpp_lacks_are_refused_by_name(family, options, message):
    theirs = tiny_config(family, **options)
    with pytest.raises(InputError, match=message):
        gguf_model(HfLmConfig(**read_config(theirs.to_dict(), "it")))


def test_models_of_no_family_are_refused_by_name():
    with pytest.raises(InputError, match="No family of native checkpoints.*final_logit_softcapping"):
        gguf_model(HfLmConfig(final_logit_softcapping=30.0))


def test_notes_say_what_llama_cpp_computes_otherwise(lively, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    source = lively("gpt_neox")
    assert main(["export", source, str(tmp_path / "neox.gguf")]) == 0
    printed = capsys.readouterr().out
    assert "not read back: transformers does not read all of it; install xllamacpp" in printed
    assert "note: llama.cpp computes hidden_act gelu in its tanh form" in printed
    source = lively("mistral", sliding_window=20)
    report = gguf.export_gguf(source, tmp_path / "mistral.gguf", "float32")
    assert report["notes"] == ["context_length is sliding_window, 20 tokens, since llama.cpp's llama has no window"]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options", "keys"), CASES, ids=NAMES)
def test_llama_cpp_writes_the_same_text(family, options, keys, lively, tokenizer, tmp_path):
    pytest.importorskip("xllamacpp")
    source, file = lively(family, **options), tmp_path / "model.gguf"
    report = gguf.export_gguf(source, file, "float32")
    assert report["top1_agreement"] == 1.0 and report["same_tokens"]
    if report["judge"] == "llama.cpp":
        assert report["max_logprob_difference"] <= (0.02 if family in WITH_GELU else 1e-4)

    model = HfLmForCausalLM.from_pretrained(source)
    prompt, written = write(model, tokenizer)
    (answer,) = llama_cpp.ask(file, [llama_cpp.greedy_request(prompt, 40, tokenizer.all_special_ids)], 64)
    assert answer["tokens"] == written


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_llama_cpp_reads_other_types(dtype, lively, tmp_path):
    pytest.importorskip("xllamacpp")
    report = gguf.export_gguf(lively("olmo2", intermediate_size=64), tmp_path / "model.gguf", dtype)
    assert report["judge"] == "llama.cpp"
    assert report["top1_agreement"] > 0.8


@pytest.mark.slow
def test_wrong_file_is_not_left_behind(lively, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    source, file = lively("granite", **GRANITE), tmp_path / "model.gguf"
    monkeypatch.setattr(gguf_models, "pair_neighbours", lambda tensor, heads: tensor)
    with pytest.raises(Failure, match="differ from the model's by up to"):
        gguf.export_gguf(source, file, "float32")
    assert not file.exists()


@pytest.mark.slow
def test_model_trained_from_scratch_runs_in_llama_cpp(small_run, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    assert main(["export", str(small_run[0]), str(tmp_path / "model.gguf"), "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["architecture"], report["judge"], report["top1_agreement"]) == ("apertus", "llama.cpp", 1.0)
    assert report["max_logprob_difference"] <= 1e-4 and report["same_tokens"]
