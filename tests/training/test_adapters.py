"""Adapters of PEFT train what they train on a Llama, are merged into equal models, and find their base from anywhere."""

import json
import re
import shutil
import warnings

import pytest
import torch
from helpers.models import book_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.interop.adapters import base_of
from hf_lm.loading import require_model
from hf_lm.tasks import task_class
from hf_lm.tasks.recipe import parse_recipe

pytestmark = pytest.mark.slow  # needs peft, which the long tests install

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
ids = torch.arange(3, 15)[None].repeat(2, 1)
VIRTUAL = {"num_virtual_tokens": 4}
# What a kind of adapter needs besides its defaults for a model as small as this.
KINDS = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": VIRTUAL,
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "MISS": {"r": 8},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 1, **VIRTUAL},
    "OFT": {"r": 0, "oft_block_size": 4},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "PSOFT": {"r": 8},
    "P_TUNING": {"encoder_hidden_size": 16, **VIRTUAL},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [5, 7]},
    "VBLORA": {"vector_length": 4},
    "WAVEFT": {"n_frequency": 10},
    "XLORA": None,  # is made of other adapters: has a test of its own
}


def train(model, config, folder) -> str:
    """Train for two steps, save, load, merge where that is possible. Returns how far it came; raises what stops it."""
    from peft import PeftModel, get_peft_model

    model.save_pretrained(folder / "base")
    kwargs = {}
    if config.peft_type in ("MULTITASK_PROMPT_TUNING", "POLY"):
        kwargs["task_ids"] = torch.zeros(2, dtype=torch.long)
    if config.peft_type == "CPT":
        kwargs["input_type_mask"] = torch.full_like(ids, 4)
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), **kwargs).loss.backward()
        assert any(weight.grad is not None for weight in adapted.parameters())
        optimizer.step()
    expected = adapted.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits
    adapted.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(type(model).from_pretrained(folder / "base"), folder / "adapter").eval()
    found = again(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    try:
        merged = again.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError):
        return "cannot be merged"
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    return "merged"


def test_every_kind_that_trains_a_llama_trains_this_model(tmp_path):
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    warnings.simplefilter("ignore")
    trained = []
    for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        options, outcomes = KINDS.get(kind.value, {}), []
        for model_class, config in (
            (LlamaForCausalLM, LlamaConfig(intermediate_size=64, **SIZES)),
            (HfLmForCausalLM, HfLmConfig(zero_init_residual=False, tie_word_embeddings=False, **SIZES)),
        ):
            if options is None:
                continue
            torch.manual_seed(0)
            folder = tmp_path / kind.value / model_class.__name__
            outcomes.append(train(model_class(config), config_class(task_type="CAUSAL_LM", **options), folder))
        assert len(set(outcomes)) <= 1, (kind, outcomes)
        trained += [kind.value] * bool(outcomes)
    assert len(trained) > 40


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, HfLmForCausalLM])
def test_a_mixture_of_adapters_is_trained(tmp_path, model_class):
    from peft import LoraConfig, XLoraConfig, get_peft_model

    def build():
        torch.manual_seed(0)
        own = {"intermediate_size": 64} if model_class is LlamaForCausalLM else {"zero_init_residual": False}
        return model_class(model_class.config_class(use_cache=False, **own, **SIZES))

    for number in "01":
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(build(), lora).save_pretrained(tmp_path / number)
    adapters = {number: str(tmp_path / number) for number in "01"}
    mixture = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=2, adapters=adapters)
    model = get_peft_model(build(), mixture)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert sum(weight.grad is not None for weight in model.parameters()) == 4  # of the two layers that weigh them
    assert model.eval()(input_ids=ids).logits.shape == (*ids.shape, SIZES["vocab_size"])


@pytest.fixture(scope="module")
def tokenizer():
    return book_tokenizer()


@pytest.fixture(params=["tied", "untied"])
def base(request, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = HfLmConfig(
        **SIZES | {"vocab_size": len(tokenizer)},
        tie_word_embeddings=request.param == "tied",
        zero_init_residual=False,
        initializer_range=0.1,
    )
    HfLmForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base, folder, count=None, **options):
    """A folder as PEFT writes it, of an adapter that changes what the model says; `count`: tokens, if more than before."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options)
    model = HfLmForCausalLM.from_pretrained(base)
    if count:
        model.resize_token_embeddings(count)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [5, 7]},
        {"layer_replication": [[0, 2], [1, 2], [0, 1]]},
    ],
    ids=str,
)
def test_the_merged_model_equals_the_adapted_one(base, options, tmp_path, capsys):
    warnings.simplefilter("ignore")
    adapted = adapter(base, tmp_path / "adapter", **options)
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert "parity over" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    before = AutoModelForCausalLM.from_pretrained(base).eval()
    assert (merged(ids).logits - before(ids).logits).abs().max() > 0.1
    if not {"target_modules", "modules_to_save"} & set(options):  # nothing unties the head in vain
        assert merged.config.tie_word_embeddings == before.config.tie_word_embeddings


def test_a_merged_model_has_the_dtype_of_its_base(base, tmp_path, capsys):
    """It is compared before its weights are rounded."""
    warnings.simplefilter("ignore")
    HfLmForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    adapted = adapter(base, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "bfloat16" in said and float(re.search(r"logit difference (\S+),", said)[1]) < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, weight in adapted.float().merge_and_unload().state_dict().items():
        assert merged[name].dtype == torch.bfloat16
        torch.testing.assert_close(merged[name].float(), weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_an_adapter_of_a_larger_vocabulary_is_merged(base, options, tmp_path, capsys):
    warnings.simplefilter("ignore")
    config = HfLmConfig.from_pretrained(base)
    count = config.vocab_size + 5
    adapted = adapter(base, tmp_path / "adapter", count=count, **options)
    if not config.tie_word_embeddings and "embed_tokens" in options.get("target_modules", []):  # PEFT loses the rows
        assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
        assert f"with {count} tokens, but PEFT did not save the head's new ones" in capsys.readouterr().err
        return
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    new = torch.cat((ids, torch.full_like(ids[:, :2], count - 1)), dim=1)
    torch.testing.assert_close(merged(new).logits, adapted(new).logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_refused_in_one_line(base, tmp_path, capsys):
    from peft import PromptTuningConfig, get_peft_model

    adapted = get_peft_model(
        HfLmForCausalLM.from_pretrained(base), PromptTuningConfig(task_type="CAUSAL_LM", **VIRTUAL)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert "an adapter of the kind PROMPT_TUNING cannot be merged" in error and error.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_a_base_is_found_from_another_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    adapter("base", tmp_path / "adapter")  # PEFT writes the path as it was given
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_of("../adapter") == str(base)
    with pytest.raises(InputError, match="its base model base is not in the current folder, but .*base"):
        require_model("../adapter")
    assert main(["merge", "../adapter", "merged"]) == 0
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())

    def write(name):
        path.write_text(json.dumps(config | {"base_model_name_or_path": name}))

    write(None)
    with pytest.raises(InputError, match="names no base model; give it with --base"):
        base_of("../adapter")
    write("gone")
    with pytest.raises(InputError, match="names a base model .* that is not there: gone: no such model folder"):
        require_model("../adapter")
    write(str(base))  # as hf-lm train writes it
    assert require_model("../adapter") == "../adapter"


@pytest.mark.parametrize("bf16", [True, False])
def test_a_base_saved_in_bfloat16_stays_in_it_where_matmuls_are_too(base, recipe, tmp_path, bf16):
    model = HfLmForCausalLM.from_pretrained(base).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    book_tokenizer().save_pretrained(tmp_path / "half")
    keys = {"model_name_or_path": str(tmp_path / "half"), "use_peft": True, "bf16": bf16, "muon_learning_rate": None}
    parsed = parse_recipe(recipe(**keys, max_steps=2, eval_strategy="no", save_strategy="no", report_to="none"), [])
    task = task_class("causal-lm")(*parsed)
    trainer = task.build_trainer(task.prepare())
    dtypes = {weight.requires_grad: weight.dtype for weight in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16 if bf16 else torch.float32}
    assert trainer.train().training_loss > 0


def test_base_model_without_a_weight_is_refused_under_its_adapter(tmp_path):
    model = HfLmForCausalLM(HfLmConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path / "base")
    peft = pytest.importorskip("peft")
    base = HfLmForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    for model_class in (HfLmForCausalLM, AutoModelForCausalLM):
        assert hasattr(model_class.from_pretrained(tmp_path / "adapter"), "peft_config")
    shutil.copytree(tmp_path / "base", tmp_path / "whole")  # a model with an adapter in its folder
    shutil.copytree(tmp_path / "adapter", tmp_path / "whole", dirs_exist_ok=True)
    for model_class in (HfLmForCausalLM, AutoModelForCausalLM):
        assert hasattr(model_class.from_pretrained(tmp_path / "whole"), "peft_config")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for model_class in (HfLmForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"missing: model\.norm\.weight"):
            model_class.from_pretrained(tmp_path / "adapter")
