"""generate, evaluate, score: what a person types after training."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.models import book_tokenizer, save_small_model
from safetensors.torch import save_file

from hf_lm import (
    HfLmConfig,
    HfLmForCausalLM,
    HfLmForQuestionAnswering,
    HfLmForSequenceClassification,
    HfLmForTokenClassification,
)
from hf_lm.cli import COMMANDS, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A small model with its tokenizer."""
    return save_small_model(tmp_path_factory.mktemp("model"), book_tokenizer())


def output_of(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_generate_with_a_seed_repeats_itself(folder, capsys):
    words = ["generate", folder, "--prompt", "Call me", "--max-new-tokens", "12", "--seed", "3"]
    first = output_of(capsys, *words)
    assert first.startswith("Call me")
    assert first == output_of(capsys, *words)
    assert first != output_of(capsys, *words[:-1], "4")
    result = json.loads(output_of(capsys, *words, "--json"))
    assert result["text"] == first.rstrip("\n") or result["text"].strip() == first.strip()
    assert 1 <= result["new_tokens"] <= 12


def test_generate_without_temperature_is_greedy_and_starts_from_nothing(folder, capsys):
    words = ["generate", folder, "--temperature", "0", "--max-new-tokens", "5", "--json"]
    first, second = (json.loads(output_of(capsys, *words)) for _ in range(2))
    assert first == second and first["prompt"] == ""


@pytest.mark.parametrize("options", [["--prompt-lookup", "4"], ["--dtype", "bfloat16"], ["--int8"]])
def test_faster_ways_to_generate(folder, capsys, options):
    words = ["generate", folder, "--temperature", "0", "--prompt", "Call me, call me", "--max-new-tokens", "8"]
    plain, fast = output_of(capsys, *words), output_of(capsys, *words, *options)
    assert fast.startswith("Call me, call me") and fast == output_of(capsys, *words, *options)
    if options[0] == "--prompt-lookup":  # the others round
        assert fast == plain


def test_a_drawn_seed_is_told_and_can_be_given_again(folder, capsys):
    words = ["generate", folder, "--max-new-tokens", "12", "--json"]
    first, second = (json.loads(output_of(capsys, *words)) for _ in range(2))
    assert first["seed"] != second["seed"]
    assert first == json.loads(output_of(capsys, *words, "--seed", str(first["seed"])))


def test_help_answers_before_torch_is_loaded():
    code = "import sys; from hf_lm.cli import main\ntry: main([sys.argv[1], '--help'])\nfinally: assert 'torch' not in sys.modules"
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.argv[0] = 'hf-lm'\n{code}", command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "usage: hf-lm" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", "x.yaml"], "unknown command 'finetune'; did you mean hf-lm train?"),
        (["eval"], "did you mean hf-lm evaluate?"),
        (["quantize"], "did you mean hf-lm export?"),
        (["traim"], "did you mean hf-lm train?"),
        (["zzz"], "there are tokenizer, train, plan"),
    ],
)
def test_an_unknown_command_names_the_closest(capsys, words, message):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_version_and_all_keys_are_told(capsys):
    from hf_lm.training.keys import NEW_MODEL, ModelArguments, TrainingKeys

    for words, expected in (
        (["--version"], ["hf-lm 0."]),
        (["train", "--help"], [*ModelArguments.__dataclass_fields__, *TrainingKeys.__dataclass_fields__, *NEW_MODEL]),
    ):
        with pytest.raises(SystemExit) as exit:
            main(words)
        text = capsys.readouterr().out
        assert exit.value.code == 0 and [part for part in expected if part not in text] == []


def test_generation_ends_where_the_model_ends(folder, capsys):
    assert main(["generate", folder, "--max-new-tokens", "500", "--json", "--seed", "0"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["new_tokens"] <= 63
    assert "63 new ones at most" in captured.err


def test_evaluate_scores_what_a_run_holds_out(folder, tmp_path, moby_dick, capsys):
    (tmp_path / "book.txt").write_text(moby_dick[:5000], encoding="utf-8")
    words = ["evaluate", folder, "--data", str(tmp_path / "book.txt"), "--json"]
    whole = json.loads(output_of(capsys, *words))
    assert whole["bytes"] == len(moby_dick[:5000].encode())
    tenth = json.loads(output_of(capsys, *words, "--last-percent", "10", "--batch-size", "1"))
    assert tenth["bytes"] == len(moby_dick[4500:5000].encode())
    assert tenth["bits_per_byte_low"] < tenth["bits_per_byte"] < tenth["bits_per_byte_high"]
    assert "bits per byte" in output_of(capsys, *words[:-1])


def test_evaluate_compares_two_models_and_names_the_worst_documents(folder, tmp_path, moby_dick, capsys):
    lines = [json.dumps({"text": text}) for text in (moby_dick[:300], "\N{WHALE}" * 30, moby_dick[400:900])]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    other = HfLmForCausalLM.from_pretrained(folder)
    other.lm_head.weight.data *= 0.1  # nearer to knowing nothing, which is better than a random guess
    other.save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{folder}/{file}", tmp_path / "other")
    words = ["evaluate", folder, "--data", str(tmp_path / "texts.jsonl"), "--compare", str(tmp_path / "other")]
    result = json.loads(output_of(capsys, *words, "--json"))
    minus, own, others = result["compared"]["minus"], result["bits_per_byte"], result["compared"]["bits_per_byte"]
    assert (
        minus["difference"] == pytest.approx(own - others) and 0 < minus["low"] < minus["difference"] < minus["high"]
    )
    alone = json.loads(output_of(capsys, "evaluate", *[str(tmp_path / "other"), *words[2:4]], "--json"))
    assert others == alone["bits_per_byte"]
    assert [row["document"] for row in result["by_document"]] != [] and result["documents"] == 3
    text = output_of(capsys, *words)
    assert f"in document {result['by_document'][0]['document']} " in text.splitlines()[1]
    assert f"{minus['difference']:+.4f} bits per byte (95%: {minus['low']:+.4f} to {minus['high']:+.4f})" in text
    strided = json.loads(output_of(capsys, *words[:4], "--stride", "16", "--json"))
    assert strided["tokens"] == result["tokens"] and strided["loss"] != result["loss"]


def test_scores_of_a_bfloat16_model_do_not_depend_on_the_batch_size(folder, tmp_path, moby_dick, capsys):
    HfLmForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{folder}/{file}", tmp_path / "half")
    (tmp_path / "book.txt").write_text(moby_dick[:4000], encoding="utf-8")
    words = ["evaluate", str(tmp_path / "half"), "--data", str(tmp_path / "book.txt"), "--json", "--batch-size"]
    one, many = (json.loads(output_of(capsys, *words, size))["loss"] for size in ("1", "8"))
    assert one == pytest.approx(many, rel=1e-6)


def test_probe_asks_pairs_from_the_held_out_part(folder, repository, capsys):
    book = str(repository / "recipes" / "moby_dick" / "data" / "moby_dick.txt")
    words = ["probe", folder, "--data", book, "--pairs", "4", "--last-percent", "5"]
    result = json.loads(output_of(capsys, *words, "--json"))
    assert result["all"]["pairs"] == sum(row["pairs"] for rule, row in result.items() if rule != "all") > 4
    text = output_of(capsys, *words)
    assert "word_order" in text and "50.0%" in text


def test_score_prints_sentences_and_tokens(folder, capsys):
    scores = json.loads(output_of(capsys, "score", folder, "Call me.", "me Call.", "--json"))
    assert [score["sentence"] for score in scores] == ["Call me.", "me Call."]
    text = output_of(capsys, "score", folder, "Call me.")
    assert f"{scores[0]['log_probability']:.3f} nats" in text
    assert all(repr(token) in text for token in scores[0]["tokens"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "{}", "--temperature", "-1"], "--temperature.*-1"),
        (["generate", "{}", "--top-p", "2"], "--top-p.*2"),
        (["generate", "{}", "--prompt-lookup", "0"], "--prompt-lookup.*0"),
        (["generate", "{}", "--max-new-tokens", "0"], "--max-new-tokens.*0"),
        (["generate", "{}", "--prompt", "word " * 100], "--prompt.*64"),
        (["generate", "./nowhere"], r"\./nowhere: no such model folder"),
        (["score", "nowhere", "x"], "nowhere: no such model folder"),
        (["score", "{}", ""], "no tokens"),
        (["probe", "{}", "--data", "nowhere.txt"], r"nowhere\.txt does not exist"),
        (["probe", "{}", "--data", "nowhere.txt", "--last-percent", "0"], "--last-percent.*0"),
        (["probe", "{}", "--data", "nowhere.txt", "--pairs", "0"], "--pairs.*0"),
        (["evaluate", "{}", "--data", "nowhere.txt"], r"nowhere\.txt does not exist"),
        (["evaluate", "{}", "--data", __file__.replace("test_use.py", ""), "--batch-size", "0"], "--batch-size.*0"),
    ],
)
def test_mistakes_are_one_line_with_exit_code_2(folder, capsys, words, message):
    assert main([word.format(folder) for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and "\n" not in error.splitlines()[-1] and "Traceback" not in error


LABELLING = {  # each command that needs a language model
    "generate": [], "score": ["x"], "chat": [], "serve": [], "inspect": ["--text", "x", "--html", "page.html"],
    "evaluate": ["--data", "book.txt"], "probe": ["--data", "book.txt"],
}  # fmt: skip


@pytest.mark.parametrize("head", [HfLmForSequenceClassification, HfLmForTokenClassification, HfLmForQuestionAnswering])
def test_a_model_that_gives_labels_is_not_used_as_a_language_model(folder, tmp_path, monkeypatch, capsys, head):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("He was there.\n\n" * 20)
    head(HfLmConfig.from_pretrained(folder)).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{folder}/{file}", tmp_path)
    for command, options in LABELLING.items() if head is HfLmForSequenceClassification else [("score", ["x"])]:
        assert main([command, str(tmp_path), *options]) == 2, command
        error = capsys.readouterr().err.splitlines()[-1]
        assert re.search(rf"{tmp_path}: is a .*\({head.__name__}\), not a language model", error), error
        assert not (tmp_path / "page.html").exists()


def test_an_adapter_that_gives_labels_is_not_used_as_a_language_model(tmp_path, capsys):
    adapter = {"task_type": "SEQ_CLS", "peft_type": "LORA", "base_model_name_or_path": "somebody/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert main(["score", str(tmp_path), "x"]) == 2
    assert "is a text classifier (adapter, task_type SEQ_CLS)" in capsys.readouterr().err


def test_folder_without_weights_or_config_is_named(tmp_path, folder, capsys):
    assert main(["score", str(tmp_path), "x"]) == 2
    assert "no config.json" in capsys.readouterr().err
    shutil.copy(f"{folder}/config.json", tmp_path)
    assert main(["score", str(tmp_path), "x"]) == 2
    assert "has no weights" in capsys.readouterr().err
