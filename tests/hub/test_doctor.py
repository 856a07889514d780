"""Each way in which a model folder can break a promise is found by the doctor, by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_lm import HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.hub.doctor import CHECKS, examine


def failures(folder, **options) -> dict[str, str]:
    return {finding.check: finding.problem for finding in examine(folder, **options) if finding.problem is not None}


def change_json(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_finished_folder_is_well(finished_folder, capsys):
    assert main(["doctor", str(finished_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS) and all(line.startswith("pass") for line in lines)


def test_the_exit_code_is_1_if_a_check_fails_and_json_names_them(model_folder, capsys):
    (model_folder / "generation_config.json").unlink()
    (model_folder / "optimizer.pt").write_bytes(b"")
    assert main(["doctor", str(model_folder), "--json"]) == 1
    failed = [finding for finding in json.loads(capsys.readouterr().out) if finding["problem"]]
    assert [finding["check"] for finding in failed] == ["no pickle files", "generation config is consistent"]
    assert all(finding["mend"] for finding in failed)


def test_what_is_no_model_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        examine(tmp_path)


@pytest.mark.parametrize("path", ["/etc/evil.Class", "../evil.Class", "C:\\evil.Class"])
@pytest.mark.parametrize("file", ["auto_map", "index", "adapter"])
def test_paths_that_lead_outside_are_found_before_anything_is_loaded(model_folder, path, file):
    if file == "auto_map":
        change_json(model_folder / "config.json", auto_map={"AutoConfig": path})
    elif file == "index":
        (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": path}}))
    else:
        (model_folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": path}))
    findings = examine(model_folder)
    assert [finding.check for finding in findings] == ["paths stay inside the folder"]
    assert path in findings[0].problem
    assert main(["doctor", str(model_folder)]) == 1


def test_incomplete_code_is_found(model_folder):
    (model_folder / "configuration_hf_lm.py").unlink()
    auto_map = json.loads((model_folder / "config.json").read_text())["auto_map"]
    del auto_map["AutoModelForTokenClassification"]
    change_json(model_folder / "config.json", auto_map=auto_map)
    problem = failures(model_folder)["code files are complete"]
    assert "configuration_hf_lm.py" in problem and "AutoModelForTokenClassification" in problem


def test_nan_weights_are_found(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in failures(model_folder)["weights are finite"]


def test_missing_and_truncated_weights_are_found(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in failures(model_folder)["loads by its Auto class"]
    content = (model_folder / "model.safetensors").read_bytes()
    (model_folder / "model.safetensors").write_bytes(content[:-100])
    assert "loads by its Auto class" in failures(model_folder)


def test_a_tokenizer_that_does_not_fit_is_found(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model_folder)
    assert failures(model_folder) == {"tokenizer fits the vocabulary": "the tokenizer has 260 tokens, the model 259"}


def test_a_pad_token_that_ends_texts_is_found(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(model_folder)
    assert set(failures(model_folder)) == {"eos is not pad"}


@pytest.mark.parametrize(
    "values", [{"eos_token_id": 5}, {"eos_token_id": None}, {"pad_token_id": 4000}, {"top_p": 2.0}]
)
def test_an_inconsistent_generation_config_is_found(model_folder, values):
    change_json(model_folder / "generation_config.json", **values)
    assert set(failures(model_folder)) == {"generation config is consistent"}


def test_ties_that_break_on_the_way_are_found(finished_folder, monkeypatch):
    save = HfLmForCausalLM.save_pretrained

    def untied(self, folder, **kwargs):
        save(
            self,
            folder,
            state_dict={**self.state_dict(), "lm_head.weight": self.lm_head.weight.detach() + 1},
            **kwargs,
        )
        change_json(Path(folder) / "config.json", tie_word_embeddings=False)

    monkeypatch.setattr(HfLmForCausalLM, "save_pretrained", untied)
    assert set(failures(finished_folder)) == {"ties survive a round trip"}


def test_a_model_whose_code_breaks_a_promise_is_found(finished_folder, monkeypatch):
    forward = HfLmForCausalLM.forward
    with monkeypatch.context() as patch:

        def without_positions(self, *args, position_ids=None, **kwargs):
            return forward(self, *args, **kwargs)

        patch.setattr(HfLmForCausalLM, "forward", without_positions)
        assert set(failures(finished_folder)) == {"packed documents are isolated"}
    with monkeypatch.context() as patch:

        def without_mask(self, *args, attention_mask=None, **kwargs):
            return forward(self, *args, **kwargs)

        patch.setattr(HfLmForCausalLM, "forward", without_mask)
        assert set(failures(finished_folder)) == {"padded equals single"}
    with monkeypatch.context() as patch:

        def averaged(self, *args, num_items_in_batch=None, **kwargs):
            return forward(self, *args, **kwargs)

        patch.setattr(HfLmForCausalLM, "forward", averaged)
        assert set(failures(finished_folder)) == {"loss does not depend on accumulation"}
    with monkeypatch.context() as patch:

        def forgetful(self, *args, past_key_values=None, cache=None, **kwargs):
            return forward(self, *args, **kwargs)

        patch.setattr(HfLmForCausalLM, "forward", forgetful)
        assert "cached equals uncached" in failures(finished_folder)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_others_are_examined_too(finished_folder, tmp_path, family, capsys):
    """transformers' classes leak between packed documents while they cache: a note, no fault of the folder."""
    torch.manual_seed(0)
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "vocab_size": 259}
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **special, initializer_range=0.2))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, **special, initializer_range=0.2))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(finished_folder).save_pretrained(tmp_path)
    assert set(failures(tmp_path)) == {"packed documents are isolated"}
    assert main(["doctor", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:35] for line in lines if not line.startswith("pass")] == ["note  packed documents are isolated"]


def test_remote_code_is_not_run_unless_trusted(model_folder, tmp_path):
    flag = tmp_path / "ran"
    shutil.copy(model_folder / "configuration_hf_lm.py", model_folder / "evil.py")
    with open(model_folder / "evil.py", "a") as file:
        file.write(f"\nopen({str(flag)!r}, 'w').close()\n")
    change_json(
        model_folder / "config.json",
        model_type="evil",
        auto_map={"AutoConfig": "evil.HfLmConfig", "AutoModelForCausalLM": "evil.X"},
    )
    assert "loads by its Auto class" in failures(model_folder)
    assert not flag.exists()
    failures(model_folder, trust_remote_code=True)
    assert flag.exists()
