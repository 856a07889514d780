"""Translation: pairs of languages in one model, only the target learned, scored against copying the source."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import sacrebleu
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.app.run import train
from hf_lm.cli import main
from hf_lm.data.packing import IGNORED
from hf_lm.errors import InputError
from hf_lm.evaluation.translation import choose_pair, encode_sources, pairs_of, score_translations, translate
from hf_lm.tasks import task_class
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.tokenization import train_tokenizer

PAIRS = ["en-de", "de-en", "en-zh", "zh-en"]
SHORT = [
    "Opens a file.",
    "Closes the selected window",
    "Prints a file.",
    "x",
    "Prints all pages of the document at once.",
]


@pytest.fixture(scope="session")
def sentences(repository) -> pandas.DataFrame:
    """The shipped data, of which the longest are left out."""
    rows = pandas.read_parquet(repository / "recipes" / "translation" / "data" / "help_en_de_zh.parquet")
    return rows[rows["en"].str.len() < 60]


@pytest.fixture
def recipe(tmp_path: Path, sentences):
    """`recipe(rows, key=value, ...)` writes a recipe of a tiny model, on 80 rows of each split unless told otherwise."""

    def write(rows: pandas.DataFrame | None = None, **changes) -> str:
        rows = sentences.groupby("split").head(80) if rows is None else rows
        rows.to_parquet(tmp_path / "rows.parquet")
        keys = {
            "task": "translation",
            "output_dir": str(tmp_path / "run"),
            "train_file": str(tmp_path / "rows.parquet"),
            "split_column_name": "split",
            "language_pairs": PAIRS,
            "max_eval_samples": 4,
            "block_size": 128,
            "vocab_size": 400,
            "config_overrides": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            "learning_rate": 0.003,
            "max_steps": 2,
            "save_strategy": "no",
            "bf16": False,
            "report_to": "none",
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**keys, **changes}))
        return str(path)

    return write


def run(path: str, *overrides: str) -> dict:
    return train(*parse_recipe(path, list(overrides)))


def encoded(path: str):
    """The training blocks and the tokenizer of a recipe."""
    arguments = parse_recipe(path, [])
    task = task_class("translation")(*arguments)
    data = task.prepare()
    return data.encoded["train"], data.tokenizer


@pytest.fixture(scope="module")
def model() -> HfLmForCausalLM:
    """A tiny model with weights so large that what it says depends on all it reads."""
    torch.manual_seed(0)
    config = HfLmConfig(
        vocab_size=304, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=48,
        zero_init_residual=False, initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return HfLmForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(SHORT, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{pair}|>" for pair in PAIRS]})
    return tokenizer


def test_a_run_ends_in_scores_of_every_pair_a_model_and_a_card(recipe, tmp_path, capsys):
    metrics = run(recipe())
    folder, printed = tmp_path / "run", capsys.readouterr().err
    assert metrics["split"] == "test"
    baseline = metrics["baselines"][0]
    for pair in PAIRS:
        assert 0 <= metrics[f"chrf/{pair}"] <= 100 and 0 <= metrics[f"bleu/{pair}"] <= 100
        low, high = metrics[f"chrf_interval/{pair}"]
        assert low <= metrics[f"chrf/{pair}"] <= high
        assert baseline[f"chrf/{pair}"] > 0
        line = f"{pair}: chrF {metrics[f'chrf/{pair}']:.1f}, BLEU"
        assert line in metrics["summary"] and line in printed
    assert "tok:zh" in metrics["signatures/en-zh"][1] and "tok:13a" in metrics["signatures/zh-en"][1]
    assert metrics["bits_per_byte"] > 0

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "chrF en-de" in card and "| en, de, zh |" in card and "copying the source" in card and "<|en-de|>" in card
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert pairs_of(tokenizer) == PAIRS
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.num_beams == 4 and model.config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_only_translations_are_learned_each_example_once_in_an_order_of_the_seed(recipe, sentences):
    blocks, tokenizer = encoded(recipe())
    again, _ = encoded(recipe())
    other, _ = encoded(recipe(seed=1))
    assert np.array_equal(np.concatenate(blocks["input_ids"][:]), np.concatenate(again["input_ids"][:]))
    assert not np.array_equal(np.concatenate(blocks["input_ids"][:]), np.concatenate(other["input_ids"][:]))

    found = []
    for block in blocks:
        for part in np.split(np.arange(len(block["input_ids"])), np.flatnonzero(block["position_ids"] == 0)[1:]):
            learned = block["labels"][part] != IGNORED
            whole = tokenizer.decode(block["input_ids"][part])
            found.append((whole, tokenizer.decode(block["input_ids"][part][learned])))
    rows = sentences[sentences["split"] == "train"].head(80)
    wanted = []
    for pair in PAIRS:
        for source, target in zip(rows[pair[:2]], rows[pair[3:]], strict=True):
            wanted.append((f"<|bos|>{source}<|{pair}|>{target}<|eos|>", f"{target}<|eos|>"))
    assert sorted(found) == sorted(wanted)
    assert sum(blocks["num_bytes"]) == sum(len(target.encode()) - len("<|eos|>") for _, target in wanted)


def test_translations_do_not_depend_on_the_batch(model, tokenizer):
    together = translate(model, tokenizer, SHORT, "en-de", num_beams=2)
    assert len(set(together)) == len(SHORT)
    assert translate(model, tokenizer, SHORT, "en-de", num_beams=2, batch_size=2) == together
    assert [translate(model, tokenizer, [text], "en-de", num_beams=2)[0] for text in SHORT] == together


def test_the_pair_decides_the_translation(model, tokenizer):
    assert len({translate(model, tokenizer, SHORT[:1], pair)[0] for pair in PAIRS}) == len(PAIRS)


def test_empty_texts_stay_empty_in_their_place(model, tokenizer):
    found = translate(model, tokenizer, ["", SHORT[0], " \n"], "en-de")
    assert found[0] == found[2] == "" and found[1] == translate(model, tokenizer, SHORT[:1], "en-de")[0]
    assert translate(model, tokenizer, [], "en-de") == []


def test_too_long_texts_are_cut_and_it_is_said(model, tokenizer, caplog):
    assert translate(model, tokenizer, ["word " * 200, "x"], "en-de", num_beams=1)[0]
    assert "1 of 2 texts are too long for the model and cut at their end" in caplog.text


def test_a_text_that_spells_a_tag_is_text(tokenizer):
    ids = encode_sources(tokenizer, ["a<|zh-en|><|eos|>"], "en-de")[0]
    special = tokenizer.convert_tokens_to_ids(["<|zh-en|>", "<|eos|>", "<|en-de|>"])
    assert special[0] not in ids and special[1] not in ids and ids.count(special[2]) == 1


def test_scores_are_those_of_sacrebleu():
    references = ["选择要打印的文件。", "打开所选的窗口。", "关闭文件"]
    translations = ["选择打印的文件。", "打开窗口。", "关闭文件"]
    scores = score_translations(translations, references, "zh")
    assert scores["bleu"] == sacrebleu.corpus_bleu(translations, [references], tokenize="zh").score
    assert scores["chrf"] == sacrebleu.corpus_chrf(translations, [references]).score
    low, high = scores["chrf_interval"]
    assert low < scores["chrf"] < high
    assert score_translations(references, references, "zh")["chrf"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (None, "de", "en-de"),
        ("zh", None, "zh-en"),
        ("de", "en", "de-en"),
        (None, "en", "--to en: may be de-en, zh-en; say --from and --to."),
        (None, None, "no --to: may be en-de, de-en, en-zh, zh-en"),
        (None, "fr", "--to fr: unknown pair; the model translates en-de, de-en, en-zh, zh-en."),
        ("de", "zh", "--from de --to zh: unknown pair"),
    ],
)
def test_a_pair_is_chosen_where_there_is_only_one(source, target, expected):
    if expected in PAIRS:
        assert choose_pair(PAIRS, source, target) == expected
    else:
        with pytest.raises(InputError, match=expected):
            choose_pair(PAIRS, source, target)


def test_the_command_translates_arguments_or_lines(model, tokenizer, tmp_path, capsys, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected = translate(model, tokenizer, SHORT[:2], "en-de")
    assert main(["translate", str(tmp_path / "model"), "--to", "de", *SHORT[:2]]) == 0
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in expected)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{SHORT[0]}\n\n{SHORT[1]}\n"))
    assert main(["translate", str(tmp_path / "model"), "--to", "de", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pair"] == "en-de" and result["beams"] == 4
    rows = [{"source": SHORT[0], "translation": expected[0]}, {"source": "", "translation": ""}]
    assert result["translations"] == [*rows, {"source": SHORT[1], "translation": expected[1]}]

    for arguments, message in (
        (["--to", "fr", "x"], "--to fr: unknown pair; the model translates en-de, de-en, en-zh, zh-en."),
        (["--to", "de", "--beams", "0", "x"], "--beams: must be at least 1, got 0."),
    ):
        assert main(["translate", str(tmp_path / "model"), *arguments]) == 2
        assert capsys.readouterr().err == f"hf-lm translate: {message}\n"
    train_tokenizer(SHORT, 300).save_pretrained(tmp_path / "model")
    assert main(["translate", str(tmp_path / "model"), "--to", "de", "x"]) == 2
    assert "its tokenizer has no tag such as <|en-de|>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language_pairs": ["en-fr"]}, "language_pairs: .*rows.* has no column fr; it has en, de, zh, split"),
        ({"language_pairs": None}, "language_pairs: name at least one"),
        ({"language_pairs": ["english"]}, "language_pairs: must be two languages as in en-de, got 'english'"),
        ({"language_pairs": ["en-en"]}, "language_pairs: must be two languages as in en-de, got 'en-en'"),
        ({"long_examples": "error", "block_size": 16}, "long_examples: example .* of train has .* tokens"),
        ({"block_size": 4}, "train: all 320 examples are longer than block_size 4; nothing is left to learn"),
    ],
)
def test_bad_recipes_are_one_clear_line(recipe, tmp_path, changes, message):
    if "split_column_name" not in changes:
        message = message.replace(".*rows.*", "train")
    with pytest.raises(InputError, match=message):
        run(recipe(**changes))
    assert not (tmp_path / "run").exists()


def test_examples_without_a_text_are_left_out_and_counted(recipe, sentences, caplog):
    rows = sentences.groupby("split").head(20).reset_index(drop=True)
    train_rows = rows.index[rows["split"] == "train"]
    rows.loc[train_rows[:5], "zh"] = ["", " ", None, "", ""]
    blocks, tokenizer = encoded(recipe(rows, packing=False))
    assert len(blocks) == 20 + 20 + 15 + 15
    assert "train: 5 of 20 examples of en-zh are empty and left out." in caplog.text
    rows.loc[train_rows, "zh"] = ""
    with pytest.raises(InputError, match="language_pairs: train has no text in both languages of en-zh"):
        encoded(recipe(rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_translations_is_read_too(recipe, tmp_path, sentences, streaming):
    rows = sentences[sentences["split"] == "train"].head(20)
    lines = [json.dumps({"translation": {"en": en, "de": de}}) for en, de in zip(rows["en"], rows["de"], strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    changes = {"train_file": str(tmp_path / "rows.jsonl"), "split_column_name": None, "language_pairs": ["de-en"]}
    changes |= {"streaming": streaming}
    blocks, tokenizer = encoded(recipe(validation_split_percentage=0, packing=False, **changes))
    assert f"<|bos|>{rows['de'].iloc[0]}<|de-en|>{rows['en'].iloc[0]}<|eos|>" in map(
        tokenizer.decode, blocks["input_ids"]
    )


@pytest.mark.slow
def test_an_existing_model_learns_new_pairs(recipe, tmp_path):
    run(recipe(language_pairs=["en-de"], output_dir=str(tmp_path / "first")))
    changes = {"model_name_or_path": str(tmp_path / "first"), "config_overrides": None, "language_pairs": ["de-en"]}
    metrics = run(recipe(**changes))
    assert "chrf/de-en" in metrics and "chrf/en-de" not in metrics
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert pairs_of(tokenizer) == ["en-de", "de-en"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_a_model_learns_to_translate_what_it_has_seen(recipe, sentences):
    rows = sentences[sentences["en"].str.len() > 20].head(60)
    rows = pandas.concat([rows.assign(split="train"), rows.head(20).assign(split="test")])
    changes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    metrics = run(
        recipe(rows, language_pairs=["en-de", "en-zh"], config_overrides=changes, validation_split_percentage=0),
        "--max_steps", "250", "--max_eval_samples", "20", "--muon_learning_rate", "0.02", "--vocab_size", "1000",
    )  # fmt: skip
    for pair in ("en-de", "en-zh"):
        assert metrics[f"chrf/{pair}"] > 80 > 50 > metrics["baselines"][0][f"chrf/{pair}"]


@pytest.mark.slow
def test_processes_share_the_final_translation(recipe, tmp_path):
    path = recipe(max_eval_samples=7, save_strategy="steps", save_steps=2)
    command = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "hf_lm", "train", path]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert together["processes"] == 2
    alone = run(path, "--resume", "--allow_changes")  # finished: only what comes after is done
    for pair in PAIRS:
        assert together[f"chrf/{pair}"] == pytest.approx(alone[f"chrf/{pair}"])
