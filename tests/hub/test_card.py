"""Model cards: complete, runnable, and without a number that nobody measured."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig

import hf_lm
from hf_lm.cli import main
from hf_lm.errors import InputError
from hf_lm.hub import card as card_module
from hf_lm.hub.card import missing_from_card, write_card


def change_json(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def body_of(path) -> str:
    return ModelCard(path.read_text(encoding="utf-8")).text


def test_the_metadata_are_those_of_the_hub(finished_folder):
    card = ModelCard.load(finished_folder / "README.md")
    data = card.data.to_dict()
    assert {key: data[key] for key in ("license", "language", "library_name", "pipeline_tag")} == {
        "license": "mit",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    results = {result.metric_type: (result.metric_value, result.metric_args) for result in card.data.eval_results}
    assert results["bits_per_byte"] == (2.1234567, {"interval": [2.05, 2.2]})
    assert set(results) == {"bits_per_byte", "perplexity", "eval_loss"}
    assert data["revisions"] == {"git_revision": "0123abc"}
    assert missing_from_card(finished_folder) == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_number_of_a_card_is_in_an_artifact(model_folder, language):
    """Without artifacts a card has no numbers but those of the config and the weights' header; with them, theirs."""
    for measured in (True, False):
        if not measured:
            (model_folder / "metrics.json").unlink()
        body = body_of(write_card(model_folder, language))
        body = re.sub(r"```python.*?```", "", body, flags=re.DOTALL)
        template = (card_module.Path(card_module.__file__).with_name(f"card_template.{language}.md")).read_text()
        words = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", " ", template, flags=re.DOTALL)
        words += "6 x"  # in the estimate's formula
        known = set(re.findall(r"\d[\d,.]*\d|\d", words))
        config = AutoConfig.from_pretrained(model_folder).to_dict()
        for value in [*config.values(), *(measured and METRIC_TEXTS or ()), *weights_numbers(model_folder)]:
            known |= {f"{value:,}" if isinstance(value, int) else str(value)}
        numbers = set(re.findall(r"(?<![\w.])\d[\d,.]*\d(?!\w)|(?<![\w.,])\d(?![\w.,])", body))
        assert len(numbers) >= (24 if measured else 8)
        assert numbers <= known, numbers - known


# What the fixture's metrics.json (tests/hub/conftest.py) reads as, and what follows from it.
METRIC_TEXTS = (
    "2.123", "2.05", "2.2", "30.5", "3.418", "3.3", "100,000", "12.5", "8000", "512", "2", "7", "10", "2.13.0",
    "1.87e+10", "20", "0.06944",
)  # fmt: skip


def weights_numbers(folder) -> list[int]:
    counts = card_module.count_parameters(folder)
    return [counts["parameters"], counts["embedding_parameters"]]


def test_what_was_not_measured_is_said(model_folder):
    (model_folder / "metrics.json").unlink()
    english, chinese = body_of(write_card(model_folder)), body_of(write_card(model_folder, "zh"))
    assert english.count("not measured") >= 8 and "Not measured." in english and "not recorded" in english
    assert chinese.count("未测量") >= 8 and "未记录" in chinese
    assert "No loss curve" in english and "没有记录损失曲线" in chinese


def test_nothing_private_gets_into_a_card(model_folder):
    (model_folder / "recipe.yaml").write_text("max_steps: 10\nhub_token: hf_secret\n")
    text = write_card(model_folder).read_text()
    assert "max_steps: 10" in text
    assert "hf_secret" not in text and "/home/somebody" not in text and "novel.txt" in text


def test_what_a_person_stated_is_kept(model_folder):
    path = model_folder / "README.md"
    path.write_text(path.read_text().replace("license: mit", "license: gpl-3.0\ndatasets:\n- owner/data"))
    data = ModelCard.load(write_card(model_folder)).data
    assert (data.license, data.language, data.datasets) == ("gpl-3.0", "en", ["owner/data"])


def test_the_base_model_is_named_with_its_pinned_revisions(model_folder):
    base = {"id": "owner/base", "revision": "a" * 40, "code_revision": "b" * 40}
    change_json(model_folder / "metrics.json", base_model=base)
    path = write_card(model_folder)
    data = ModelCard.load(path).data.to_dict()
    assert data["base_model"] == "owner/base"
    assert data["revisions"]["base_model_revision"] == "a" * 40
    assert data["revisions"]["base_model_code_revision"] == "b" * 40
    assert f"owner/base (revision {'a' * 40}, code revision {'b' * 40})" in body_of(path)
    change_json(model_folder / "metrics.json", base_model="/home/somebody/base")
    path = write_card(model_folder)
    assert "started from base" in body_of(path) and "/home" not in path.read_text()


def test_what_an_import_compared_is_in_the_card(model_folder):
    (model_folder / "metrics.json").unlink()
    parity = {
        "source": "/home/somebody/llama",
        "family": "llama",
        "max_logit_difference": 1.5e-6,
        "top1_agreement": 1.0,
    }
    (model_folder / "parity.json").write_text(json.dumps(parity))
    body = body_of(write_card(model_folder))
    assert "started from llama" in body and "| max_logit_difference | 1.5e-06 |" in body and "/home" not in body


@pytest.mark.parametrize("content", ['{"bits_per_byte": NaN}', '{"perplexity": "great"}', "[]", "{"])
def test_broken_artifacts_are_refused_and_the_old_card_stays(model_folder, content, capsys):
    before = (model_folder / "README.md").read_bytes()
    (model_folder / "metrics.json").write_text(content)
    with pytest.raises(InputError, match="metrics.json"):
        write_card(model_folder)
    assert main(["card", str(model_folder)]) == 2 and "metrics.json" in capsys.readouterr().err
    assert (model_folder / "README.md").read_bytes() == before
    assert not list(model_folder.glob(".*"))


def test_the_code_of_the_card_runs(model_folder, monkeypatch, capsys):
    monkeypatch.chdir(model_folder.parent)
    config = AutoConfig.from_pretrained(model_folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    classes = {path.split(".")[1] for path in hf_lm.configuration_hf_lm.AUTO_MAP.values()} - {"HfLmConfig"}
    for name in [*sorted(classes), "chat"]:
        if name == "chat":
            (model_folder / "chat_template.jinja").write_text(template)
            name = "HfLmForCausalLM"
        torch.manual_seed(0)
        getattr(hf_lm, name)(config).save_pretrained(model_folder)
        for language in ("en", "zh"):
            (code,) = re.findall(r"```python\n(.*?)```", body_of(write_card(model_folder, language)), re.DOTALL)
            exec(code, {})
    assert "apply_chat_template" in code
    assert "torch.Size([1, 7, 32])" in capsys.readouterr().out


def test_cards_of_many_models_are_written_by_one_command(model_folder, tmp_path, capsys):
    (model_folder / "loss_curve.png").write_bytes(b"png")
    cards = tmp_path / "cards"
    cards.mkdir()
    assert main(["card", str(model_folder), str(model_folder), "--output", str(cards)]) == 0
    assert main(["card", str(model_folder), "--output", str(cards), "--language", "zh"]) == 0
    assert sorted(path.name for path in (cards / "tiny").iterdir()) == ["README.md", "README.zh.md", "loss_curve.png"]
    assert main(["card", str(model_folder), str(model_folder), "--output", str(tmp_path / "one.md")]) == 2


def test_the_templates_ask_for_the_same_facts(repository):
    """A fact that one language states, the other states too."""
    stated = []
    for language in ("en", "zh"):
        text = (repository / "hf_lm" / "hub" / f"card_template.{language}.md").read_text(encoding="utf-8")
        expressions = re.findall(r"\{\{(.*?)\}\}|\{%(.*?)%\}", text)
        stated.append([re.sub(r'"[^"]*"', '""', "".join(expression)) for expression in expressions])
        assert (repository / "model_cards" / f"template.{language}.md").read_text(encoding="utf-8") == text
    assert stated[0] == stated[1]
