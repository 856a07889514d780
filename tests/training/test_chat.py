"""Conversations: only the assistant's words are learned, answers end, adapters are merged and handed on."""

import copy
import io
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lm.app.run import train
from hf_lm.cli import main
from hf_lm.data.packing import IGNORED
from hf_lm.errors import InputError
from hf_lm.interop.adapters import merge_adapter
from hf_lm.tasks import task_class
from hf_lm.tasks.chat import mark_assistant, use_chat_template
from hf_lm.tasks.recipe import parse_recipe
from hf_lm.tokenization import train_tokenizer

PAIRS = [("Who are you?", "Call me Ishmael."), ("What is the sea?", "A hill of water."), ("And the whale?", "White.")]


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def write_rows(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chat(recipe, tmp_path):
    """`chat(key=value, ...)`: the parsed recipe of a short conversation run."""
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": turns(*pair)} for pair in PAIRS * 8])

    def parsed(**changes):
        keys = {
            "task": "chat",
            "train_file": data,
            "test_file": data,
            "max_eval_samples": 3,
            "sample_prompts": None,
            **changes,
        }
        return parse_recipe(recipe(**keys), [])

    return parsed


def trainer_of(parsed):
    task = task_class("chat")(*parsed)
    return task.build_trainer(task.prepare())


def test_only_the_assistants_words_and_their_end_are_learned(chat):
    trainer = trainer_of(chat(packing=False))
    tokenizer = trainer.processing_class
    row = trainer.train_dataset[0]
    learned = tokenizer.decode(row["labels"][np.asarray(row["labels"]) != IGNORED])
    assert learned == PAIRS[0][1] + tokenizer.eos_token
    whole = tokenizer.decode(row["input_ids"])
    assert whole == "<|bos|><|im_start|>user\nWho are you?<|eos|>\n<|im_start|>assistant\nCall me Ishmael.<|eos|>\n"


def test_batches_of_a_compiled_run_have_one_shape_and_what_is_held_out_gets_no_rows(chat):
    trainer = trainer_of(chat(torch_compile_backend="aot_eager", per_device_train_batch_size=2, block_size=200))
    assert len(trainer.train_dataset) % 2  # the last batch is smaller
    assert {batch["input_ids"].shape for batch in trainer.get_train_dataloader()} == {(2, 200)}
    held_out = sum(len(batch["input_ids"]) for batch in trainer.get_eval_dataloader())
    assert held_out == len(trainer.eval_dataset)


def test_packed_conversations_hold_every_example_once(chat):
    packed, single = (trainer_of(chat(packing=packing)).train_dataset for packing in (True, False))
    assert len(packed) < len(single)
    starts = sum(int((np.asarray(row["position_ids"]) == 0).sum()) for row in packed)
    assert starts == len(single)
    for name in ("input_ids", "labels"):
        assert sum(int(row[name].sum()) for row in packed) == sum(int(row[name].sum()) for row in single)


class Pieces(io.StringIO):
    """What is written, and what of it had been shown at each flush."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def flush(self):
        self.shown.append(self.getvalue())


def test_a_trained_model_answers_remembers_and_stops(chat, tmp_path, monkeypatch, capsys):
    rows = [{"messages": turns(question, answer, "Again?", answer)} for question, answer in PAIRS * 8]
    data = {name: write_rows(tmp_path / "chat.jsonl", rows) for name in ("train_file", "test_file")}
    metrics = train(*chat(**data, max_steps=200, eval_strategy="no", save_strategy="no", learning_rate=0.01))
    assert metrics["self_ended"] == 1.0 and metrics["answers"] == 3
    assert "answers end by themselves" in metrics["summary"]
    assert "| share of answers that end by themselves | 1 |" in (tmp_path / "run" / "README.md").read_text()
    capsys.readouterr()
    asked = ["Who are you?", "Again?", "", "/new", "What is the sea?", "Again?", "long " * 90]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{text}\n" for text in asked)))
    monkeypatch.setattr(sys, "stdout", output := Pieces())
    assert main(["chat", str(tmp_path / "run"), "--max-new-tokens", "12"]) == 0
    assert output.getvalue().splitlines() == [PAIRS[0][1]] * 2 + [PAIRS[1][1]] * 2
    assert {"Call", "Call me"} <= {shown.strip() for shown in output.shown}  # long before the end
    assert "the model takes 64" in capsys.readouterr().err


def test_a_model_without_a_template_is_told(tmp_path, recipe, capsys):
    train(*parse_recipe(recipe(max_steps=1, eval_strategy="no"), []))
    assert main(["chat", str(tmp_path / "run")]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "Why?"}], "needs a column messages .or prompt and completion.; it has question"),
        ([{"messages": turns("Why?", "So.")}, {"messages": turns("Why?")}], "row 2 has no message of the assistant"),
        ([{"messages": turns("Why?", "")}], "row 1 is not a list of messages"),
        ([{"messages": turns("Why?", " \n")}], "row 1 is not a list of messages"),
        ([{"messages": [{"role": "assistant", "content": ["So."]}]}], "row 1 is not a list of messages"),
        (
            [{"prompt": "1+1", "completion": 2}, {"prompt": "1/2", "completion": 0.5}],
            "row 1: column completion is 2, not text",
        ),
        (
            [{"prompt": turns("a", "b"), "completion": turns("c", "d")[1:]}],
            "row 1: prompt has a message of the assistant",
        ),
        ([{"text": "a", "label": "b"}], "learned by task: sequence-classification"),
        ([{"messages": turns("word " * 200, "So.")}] * 2, "all 2 examples are longer than block_size 64"),
    ],
)
def test_bad_rows_are_named(chat, tmp_path, rows, message):
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(InputError, match=message):
        trainer_of(chat(train_file=path, test_file=None, validation_split_percentage=0))


def test_conversations_are_read_in_all_forms_in_use(chat, tmp_path):
    parts = lambda turn: {**turn, "content": [{"type": "text", "text": part} for part in turn["content"]]}  # noqa: E731
    forms = {
        "pairs": lambda a, b: {"prompt": a, "completion": b},
        "lists": lambda a, b: {"prompt": turns(a, b)[:1], "completion": turns(a, b)[1:]},  # TRL's
        "parts": lambda a, b: {"messages": [*map(parts, turns(a, b))]},  # OpenAI's
    }
    seen = []
    for name, form in forms.items():
        path = write_rows(tmp_path / f"{name}.jsonl", [form(*pair) for pair in PAIRS])
        trainer = trainer_of(chat(train_file=path, test_file=None, validation_split_percentage=0, packing=False))
        seen.append([trainer.processing_class.decode(row["input_ids"]) for row in trainer.train_dataset])
    assert "Call me Ishmael." in seen[0][0] and seen[0] == seen[1] == seen[2]


def test_one_conversation_cannot_be_split(chat, tmp_path):
    path = write_rows(tmp_path / "one.jsonl", [{"messages": turns(*PAIRS[0])}])
    with pytest.raises(InputError, match="validation_split_percentage: 10.0 per cent of 1 rows leaves none"):
        trainer_of(chat(train_file=path, test_file=None))


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_what_is_learned_are_the_turns_that_the_template_marks(kind, caplog):
    tokenizer = train_tokenizer(["Call me Ishmael"], 300, kind=kind)
    tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn.role == 'assistant' %}{%- generation -%}{{ turn.content }}"
        "{% endgeneration %}{% else %}|{{ turn.content }}|{% endif %}{% endfor %}"
    )
    use_chat_template(tokenizer)
    assert "|{{ turn.content }}|" in tokenizer.chat_template  # its own is kept, because it marks what is learned
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    use_chat_template(other)
    assert other.chat_template != "{{ messages }}" and "ours is used instead" in caplog.text
    for contents in (
        ["A", "user"],
        ["鲸鱼", "user"],
        ["", "user"],
        ["say  ", " user ", "e\u0301 👩‍👩‍👧"],
        ["A", "B", "\n"],
    ):
        messages = [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(contents)]
        input_ids, learned = mark_assistant(tokenizer, messages)
        assert input_ids == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        said = [number for number, is_learned in zip(input_ids, learned, strict=True) if is_learned]
        assert tokenizer.decode(said) == "".join(contents[::2])
        rest = [number for number, is_learned in zip(input_ids, learned, strict=True) if not is_learned]
        assert tokenizer.decode(rest) == "".join(f"|{text}|" for text in contents[1::2])


def test_a_tokenizer_without_special_tokens_is_refused(chat, tmp_path, recipe):
    letters = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(ByteLevel.alphabet())}, merges=[]))
    letters.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(tmp_path / "letters")
    with pytest.raises(InputError, match="tokenizer_name: the tokenizer has no eos token to end an answer with"):
        trainer_of(chat(tokenizer_name=str(tmp_path / "letters")))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "ab"[n % 2], "label": "ab"[n % 2]} for n in range(8)])
    path = recipe(
        task="sequence-classification", train_file=rows, tokenizer_name=str(tmp_path / "letters"), baseline=False
    )
    with pytest.raises(InputError, match="tokenizer_name: the tokenizer has neither a pad nor an eos token"):
        task_class("sequence-classification")(*parse_recipe(path, [])).prepare()


def test_a_template_without_the_mark_is_refused(chat, tmp_path):
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="has no {% generation %}"):
        trainer_of(chat(chat_template=str(tmp_path / "template.jinja")))
    with pytest.raises(InputError, match="does not exist"):
        trainer_of(chat(chat_template="none.jinja"))


def test_every_answer_of_the_shipped_data_is_a_sentence_of_the_help(repository, tmp_path, monkeypatch):
    folder = repository / "recipes" / "chat"
    help_texts = pandas.read_parquet(folder.parent / "translation" / "data" / "help_en_de_zh.parquet")
    english = {}
    for split, rows in help_texts.groupby("split"):
        sentences = set(rows[["en", "de", "zh"]].to_numpy().ravel())
        made = [json.loads(line)["messages"] for line in (folder / "data" / f"{split}.jsonl").open(encoding="utf-8")]
        assert made and all(turn["content"] in sentences for row in made for turn in row[1::2])
        english[split] = {row[1]["content"] for row in made if row[0]["content"].startswith("How do I")}
    assert not english["train"] & english["test"] and not english["train"] & english["validation"]
    (tmp_path / "translation").symlink_to(folder.parent / "translation")
    (tmp_path / "chat" / "data").mkdir(parents=True)
    shutil.copy(folder / "build_data.py", tmp_path / "chat")
    runpy.run_path(str(tmp_path / "chat" / "build_data.py"), run_name="__main__")
    for path in sorted((folder / "data").glob("*.jsonl")):
        assert (tmp_path / "chat" / "data" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow  # needs peft, which the long tests install
def test_an_adapter_is_trained_reloaded_merged_and_handed_on(chat, tmp_path, capsys):
    base = tmp_path / "base"
    train(*chat(output_dir=str(base), max_steps=20, eval_strategy="no", save_strategy="no"))
    run, merged = tmp_path / "run", tmp_path / "merged"
    keys = {"model_name_or_path": str(base), "use_peft": True, "muon_learning_rate": None, "config_overrides": None}
    metrics = train(*chat(**keys, max_steps=4, eval_strategy="no"))
    assert (run / "adapter_model.safetensors").exists() and not (run / "model.safetensors").exists()
    assert metrics["base_model"]["id"] == str(base)
    assert main(["generate", str(run), "--prompt", "Who are you?", "--max-new-tokens", "2"]) == 0
    assert main(["merge", str(run), str(merged)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer("Who are you?", return_tensors="pt").input_ids
    adapted, plain = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (run, merged))
    torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert any(
        not torch.equal(value, other)
        for value, other in zip(
            load_file(base / "model.safetensors").values(),
            load_file(merged / "model.safetensors").values(),
            strict=True,
        )
    )
    assert main(["merge", str(run), str(merged)]) == 2  # it is there already
    assert main(["merge", str(base), str(tmp_path / "none")]) == 2
    other = tmp_path / "other"
    train(*chat(output_dir=str(other), max_steps=1, eval_strategy="no",
                config_overrides={"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}))  # fmt: skip
    capsys.readouterr()
    assert main(["merge", str(run), str(tmp_path / "none"), "--base", str(other)]) == 2
    assert "made for another model" in capsys.readouterr().err
    weights = load_file(run / "adapter_model.safetensors")
    deeper = {name.replace("layers.1", "layers.2"): value.clone() for name, value in weights.items()}
    save_file(weights | deeper, run / "adapter_model.safetensors", metadata={"format": "pt"})
    assert main(["merge", str(run), str(tmp_path / "none")]) == 2
    assert "only one of them has base_model.model.model.layers.2" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="cannot be loaded"):
        merge_adapter(str(run), str(tmp_path / "gone"))


@pytest.mark.slow
def test_an_adapter_fits_the_weights_it_was_trained_on_and_goes_on_natively(chat, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(*chat(output_dir="first", max_steps=1, eval_strategy="no", save_strategy="no"))
    tokenizer = AutoTokenizer.from_pretrained("first")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    for name in ("base", "other"):
        LlamaForCausalLM(config).save_pretrained(f"{name}_llama")
        tokenizer.save_pretrained(f"{name}_llama")
        assert main(["import", f"{name}_llama", name]) == 0
    keys = {"model_name_or_path": "base", "use_peft": True, "muon_learning_rate": None, "config_overrides": None}
    train(*chat(**keys, output_dir="run", max_steps=4, eval_strategy="no"))
    assert main(["merge", "run", "merged"]) == 0
    assert main(["export", "merged", "native"]) == 0
    native = AutoModelForCausalLM.from_pretrained("native").eval()
    assert type(native) is LlamaForCausalLM
    ids = tokenizer("Who are you?", return_tensors="pt").input_ids
    adapted = AutoModelForCausalLM.from_pretrained("run").eval()
    torch.testing.assert_close(native(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    capsys.readouterr()

    assert main(["export", "run", "none"]) == 2
    assert "is an adapter; hf-lm merge takes it into its base model first" in capsys.readouterr().err
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
        assert main(["chat", "run", "--max-new-tokens", "2", "--dtype", dtype]) == 0
    capsys.readouterr()
    assert main(["merge", "run", "none", "--base", "other"]) == 2
    shutil.rmtree("base")
    shutil.copytree("other", "base")
    for words in (["chat", "run"], ["merge", "run", "none"]):
        assert main(words) == 2
    assert capsys.readouterr().err.count("made for another model: the base model has other weights") == 3
    assert not Path("none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trl_takes_the_same_conversations(chat, tmp_path, repository, kind):
    train(*chat(max_steps=2, eval_strategy="no", save_strategy="no", block_size=256, config_overrides={
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1024}))  # fmt: skip
    command = [sys.executable, str(repository / "recipes/chat/with_trl.py"), kind, str(tmp_path / "run"), str(tmp_path / "out")]  # fmt: skip
    words = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--save_strategy", "no"]  # fmt: skip
    if kind == "grpo":
        words += ["--num_generations", "2", "--max_completion_length", "8"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "hf_lm"


@pytest.mark.slow
def test_two_processes_learn_as_one(chat, recipe, tmp_path):
    """A recipe of the task chat runs unchanged under a launcher: same losses, same answers."""
    train(*chat(output_dir=str(tmp_path / "base"), max_steps=40, eval_strategy="no", save_strategy="no"))
    rows = [{"messages": turns(*pair)} for pair in PAIRS * 8]
    keys = {"task": "chat", "train_file": write_rows(tmp_path / "chat.jsonl", rows), "sample_prompts": None,
            "model_name_or_path": str(tmp_path / "base"), "config_overrides": None, "muon_learning_rate": None,
            "use_peft": True, "logging_steps": 1, "max_steps": 6, "eval_strategy": "no"}  # fmt: skip
    path = recipe(**keys)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    found = []
    for words, size, name in (([], "4", "one"), (launch, "2", "two")):
        command = [sys.executable, *words, "-m", "hf_lm", "train", path, "--output_dir", str(tmp_path / name)]
        command += ["--per_device_train_batch_size", size]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        metrics, state = (json.loads((tmp_path / name / f"{file}.json").read_text()) for file in ("metrics", "trainer_state"))  # fmt: skip
        found.append([metrics["bits_per_byte"], *(row["loss"] for row in state["log_history"] if "loss" in row)])
        assert metrics["answers"] == 3
    assert len(found[0]) == 7 and found[1] == pytest.approx(found[0], abs=1e-4)
