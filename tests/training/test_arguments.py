"""The recipe: YAML first, the command line over it, every value as it was written, every mistake named."""

from pathlib import Path

import pytest
import yaml

from hf_lm.app.artifacts import recipe_of, write_recipe
from hf_lm.data.arguments import DataArguments
from hf_lm.errors import InputError
from hf_lm.tasks import TASKS, arguments_class, fields_of, own_keys
from hf_lm.tasks.recipe import parse_recipe, recipe_keys
from hf_lm.training.keys import RENAMED


@pytest.fixture
def parsed(tmp_path):
    """`parsed(text, *words)` parses a recipe and the one that its run would keep, which must say the same."""

    def parse(text: str, *words: str) -> dict:
        path = tmp_path / "bare.yaml"
        path.write_text(text, encoding="utf-8")
        found = parse_recipe(str(path), list(words))
        write_recipe(tmp_path, recipe_of(*found))
        again = parse_recipe(str(tmp_path / "recipe.yaml"), [])
        values = [
            {name: value for group in groups for name, value in vars(group).items()} for groups in (found, again)
        ]
        changing = ("logging_dir", "use_cpu", "distributed_state", "deepspeed_plugin", "_n_gpu")
        for name in values[0].keys() - set(changing):
            assert values[0][name] == values[1][name], name
        return values[0]

    return parse


def test_command_line_wins_over_yaml(recipe):
    model, data, training = parse_recipe(recipe(learning_rate=0.5), ["--learning-rate", "0.25", "--block_size=32"])
    assert training.learning_rate == 0.25
    assert data.block_size == 32
    assert model.vocab_size == 400


LABELS = "task: label-likelihood\n"
WRITTEN = [
    "no",
    "off",
    "Yes",
    "010",
    "12:30",
    "1e-5",
    "2024_11_28",
    "2024-11-28",
    "0x1F",
    "1_000",
    ".inf",
    "= x",
    "true",
]


def test_text_is_what_was_written(parsed):
    """Each of these is a number, date or truth value to YAML 1.1 or 1.2."""
    for text in WRITTEN:
        values = parsed(
            f"output_dir: {text}\nlanguage: {text}\n{LABELS}class_names: [{text}, a]\nlabel_words:\n- a\n- {text}\n"
            f"config_overrides: {{id2label: {{0: '{text}', 1: b}}}}\nrun_name: '{text}'\n"
        )
        for key in ("output_dir", "language", "run_name"):
            assert values[key] == text
        assert values["class_names"] == [text, "a"] and values["label_words"] == ["a", text]
        assert values["config_overrides"] == {"id2label": {"0": text, "1": "b"}}
    values = parsed(LABELS + "prompt_template: '- {text}{label}'\nsample_prompts: ['--x', 'null', '']")
    assert values["sample_prompts"][:2] == ["--x", "null"] and values["prompt_template"] == "- {text}{label}"


def test_numbers_and_truth_values_are_those_of_the_keys_type(parsed):
    text = """
        weight_decay: 1e-2
        seed: 010
        max_steps: 1e3
        eval_strategy: no
        save_strategy: "no"
        streaming: off
        packing: NO
        use_peft: on
        lr_scheduler_type: cosine_with_min_lr
        lr_scheduler_kwargs: {min_lr: 1e-5}
        gradient_checkpointing_kwargs: {use_reentrant: no, early_stop: yes}
        config_overrides: {norm_eps: 1e-5, hidden_size: 032, tie_word_embeddings: off, hidden_act: relu2, x: "1"}
        optim: adafactor
        optim_args: {scale_parameter: false, x: 1}
    """
    values = parsed("\n".join(line.strip() for line in text.splitlines()))
    names = ("weight_decay", "seed", "max_steps", "streaming", "packing", "use_peft", "eval_strategy", "optim_args")
    assert [values[name] for name in names] == [0.01, 10, 1000, False, False, True, "no", "scale_parameter=False,x=1"]
    assert values["lr_scheduler_kwargs"] == {"min_lr": 1e-5}
    assert values["gradient_checkpointing_kwargs"] == {"use_reentrant": False, "early_stop": True}
    assert values["config_overrides"] == {
        "norm_eps": 1e-5, "hidden_size": 32, "tie_word_embeddings": False, "hidden_act": "relu2", "x": "1"
    }  # fmt: skip


def test_fields_of_a_mapping_are_put_into_the_recipes(parsed):
    text = "config_overrides: {hidden_size: 48, qk_norm: null}\nlr_scheduler_kwargs: {a: 1}\noptim_args: a=1,b=2\n"
    words = ["--config_overrides", "norm_eps=0.1,layer_types=[a,b]", "--config_overrides", '{"hidden_size": 64}']
    values = parsed(text, *words, "--lr_scheduler_kwargs", "b=1e-3", "--optim_args", "b=3")
    assert values["config_overrides"] == {"hidden_size": 64, "qk_norm": None, "norm_eps": 0.1, "layer_types": ["a", "b"]}  # fmt: skip
    assert values["lr_scheduler_kwargs"] == {"a": 1, "b": 0.001} and values["optim_args"] == "a=1,b=3"
    anew = parsed(
        text, "--config_overrides", "null", "--config_overrides", "hidden_size=32", "--fsdp_config", "x.json"
    )
    assert anew["config_overrides"] == {"hidden_size": 32} and anew["fsdp_config"] == "x.json"


def test_keys_are_unset_and_lengths_exclude_each_other(parsed):
    text = LABELS + "max_steps: 9\nlanguage: en\nclass_names: [a]\nreport_to: [tensorboard, none]\nlearning_rate: 1"
    values = parsed(text, "--num_train_epochs", "2", "--language", "null", "--class_names", "null", "--learning_rate", "null")  # fmt: skip
    assert (values["max_steps"], values["num_train_epochs"], values["learning_rate"]) == (-1, 2, 0.003)
    assert values["language"] is values["class_names"] is None
    assert values["report_to"] == ["tensorboard", "none"]
    values = parsed("num_train_epochs: 2", "--max_steps", "5", "--no-packing", "--report_to", "none")
    assert (values["max_steps"], values["num_train_epochs"], values["packing"], values["report_to"]) == (5, 3, False, [])  # fmt: skip


def test_defaults_are_those_that_were_measured_and_the_recipe_wins(parsed):
    rates = ("learning_rate", "muon_learning_rate", "adam_beta2")
    watched = ("warmup_steps", "logging_steps", "eval_strategy", "eval_steps", "save_steps")

    def got(names: tuple, *lines: str) -> list:
        values = parsed("\n".join(("seed: 1", *lines)))
        return [values[name] for name in names]

    assert got(rates) == [0.003, 0.02, 0.95]
    assert got(watched) == [0.02, 0.01, "steps", 0.25, 0.25]
    assert got(rates, "model_name_or_path: x") == [5e-5, None, 0.999]
    assert got(rates, "learning_rate: 5e-5", "muon_learning_rate: null", "adam_beta2: 0.999") == [5e-5, None, 0.999]
    assert got(rates, "optim: sgd") == [0.003, None, 0.95]
    assert got(watched, "eval_steps: 7", "warmup_steps: 0") == [0, 0.01, "steps", 7, 500]
    assert got(watched, "save_steps: 7")[3:] == [7, 7]
    assert got(watched, "save_strategy: epoch")[2] == "epoch"
    assert got(watched, "eval_steps: 300", "load_best_model_at_end: true")[3:] == [300, 300]
    assert got(("save_strategy",), "eval_strategy: epoch", "early_stopping_patience: 3") == ["epoch"]


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"learning_rte": 1}, [], "learning_rte.*did you mean 'learning_rate'"),
        ({}, ["--trainfile", "x"], "trainfile.*did you mean 'train_file'"),
        ({"batch_size": 1}, [], "did you mean 'per_device_train_batch_size'"),
        ({"epochs": 1}, [], "did you mean 'num_train_epochs'"),
        ({}, ["--lr", "1"], "command line: .*'lr'.*did you mean 'learning_rate'"),
        ({"hidden_size": 1}, [], "config_overrides: {hidden_size: "),
        ({}, ["--n_layers", "1"], "config_overrides: {num_hidden_layers: "),
        ({"zzz": 1}, [], r"recipe.yaml: unknown key 'zzz'\.$"),
        ({"max_steps": "many"}, [], "max_steps.*many"),
        ({"max_steps": 0}, [], "max_steps: must be at least 1, or -1"),
        ({"max_steps": 1.5}, [], "max_steps.*whole number.*1.5"),
        ({"max_steps": [1, 2]}, [], "max_steps.*list"),
        ({"max_steps": {"a": 1}}, [], "max_steps.*got the dict"),
        ({"class_names": [[1]]}, [], "class_names: expected one list of texts"),
        ({"task": "chatt"}, [], "task: unknown task 'chatt'; did you mean 'chat'?"),
        ({"class_names": "a"}, [], r"recipe.yaml: class_names is a key of task sequence-classification and "
         "label-likelihood; the task here is causal-lm"),
        ({"control_file": "a.txt", "task": "chat"}, [], "control_file is a key of task causal-lm; the task here is chat"),
        ({}, ["--language_pairs", "en-de"], "command line: language_pairs is a key of task translation; the task here"),
        ({"packing": "maybe"}, [], "packing: must be true or false, got 'maybe'"),
        ({"eval_strategy": "maybe"}, [], "eval_strategy: must be one of no, steps, epoch, got 'maybe'"),
        ({}, ["--seed", "x"], "command line: seed.*x"),
        ({}, ["--seed"], "command line: --seed needs a value"),
        ({}, ["max_steps=3"], "'max_steps=3' belongs to no key; write --max_steps 3"),
        ({}, ["--seed", "1", "max_steps=3"], "'max_steps=3' belongs to no key; write --max_steps 3"),
        ({}, ["--sample_prompts", "a", "max_steps=3"], "write --max_steps 3"),
        ({}, ["--seed", "1", "2"], "'2' belongs to no key; keys are written as --key value"),
        ({"lr_scheduler_type": "zigzag"}, [], "lr_scheduler_type: zigzag"),
        ({}, ["--config_overrides", "hidden_size"], "hidden_size.*name=value"),
        ({"config_overrides": "{a: [}"}, [], "config_overrides: "),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line(recipe, changes, overrides, message):
    with pytest.raises(InputError, match=message) as error:
        parse_recipe(recipe(**changes), overrides)
    assert "\n" not in str(error.value)


def test_each_task_gets_its_own_keys_and_those_that_all_share(recipe):
    shared = set(DataArguments.__dataclass_fields__)
    seen = set(shared)
    for group in own_keys():
        own = {field.name for field in fields_of(group)}
        assert not own & seen, "a key of two tasks stands in DataArguments, or in one dataclass of theirs"
        seen |= own
    for task in TASKS:
        data = parse_recipe(recipe(task=task), [])[1]
        assert type(data) is arguments_class(task) and data.task == task and vars(data).keys() >= shared
    assert not hasattr(parse_recipe(recipe(), [])[1], "class_names")
    data = parse_recipe(recipe(task="sequence-classification", class_names=["a", "b"]), [])[1]
    assert data.class_names == ["a", "b"]
    changed = ["--task", "causal-lm", "--class_names", "null"]
    assert parse_recipe(recipe(task="label-likelihood", class_names=["a"]), changed)[1].task == "causal-lm"


def test_keys_that_were_renamed_are_read_under_both_names(recipe, monkeypatch, caplog):
    monkeypatch.setitem(RENAMED, "context_size", ("block_size", "0.4.0"))
    monkeypatch.setitem(RENAMED, "pack", ("packing", "0.4.0"))
    path = recipe(context_size=32)
    with pytest.raises(InputError, match=r"recipe.yaml: context_size is the old name of block_size.*leave out"):
        parse_recipe(path, [])  # the small recipe has a block_size
    keys = {key: value for key, value in yaml.safe_load(Path(path).read_text()).items() if key != "block_size"}
    Path(path).write_text(yaml.safe_dump(keys))
    caplog.clear()
    found = parse_recipe(path, ["--no_pack"])
    assert (found[1].block_size, found[1].packing) == (32, False)
    assert [record.message for record in caplog.records] == [
        f"{path}: context_size is called block_size now; hf-lm 0.4.0 no longer reads the old name.",
        "command line: pack is called packing now; hf-lm 0.4.0 no longer reads the old name.",
    ]
    assert "block_size" in recipe_of(*found) and "context_size" not in recipe_of(*found)
    assert parse_recipe(path, ["--context-size", "16"])[1].block_size == 16
    assert parse_recipe(path, ["--block_size", "16"])[1].block_size == 16
    for words in (["--block_size", "1", "--context_size", "1"], ["--context_size=1", "--block_size=1"]):
        with pytest.raises(InputError, match="command line: context_size is the old name of block_size"):
            parse_recipe(path, words)
    with pytest.raises(InputError, match="'context_size=3' belongs to no key; write --context_size 3"):
        parse_recipe(path, ["context_size=3"])


def test_every_name_that_a_key_once_had_leads_to_a_key():
    keys = recipe_keys()
    assert all(new in keys and old not in keys for old, (new, _) in RENAMED.items())


def test_paths_are_read_as_a_shell_reads_them(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").write_text("a file of this name")
    (tmp_path / "a$b.txt").write_text("and of this")
    path = recipe(
        output_dir="$RUNS/one", train_file=["~/book.txt", "a$b.txt", "~"], model_name_or_path="~/base",
        tokenizer_name="${RUNS}/one",
    )  # fmt: skip
    model, data, training = parse_recipe(path, [])
    assert training.output_dir == str(tmp_path / "runs" / "one") == model.tokenizer_name
    assert data.train_file == [str(tmp_path / "book.txt"), "a$b.txt", "~"]
    assert model.model_name_or_path == str(tmp_path / "base")
    with pytest.raises(InputError, match=r"output_dir: \$NOT_SET/x names the environment variable NOT_SET, which is"):
        parse_recipe(path, ["--output_dir", "$NOT_SET/x"])


def test_files_that_are_no_recipe_are_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        parse_recipe(str(tmp_path / "nowhere.yaml"), [])
    twice = "seed: 1\nconfig_overrides: {a: 1}\nseed: 2"
    for text in ("- a\n- list\n", "key: [unclosed", "just text", twice, "config_overrides:\n  a: 1\n  a: 2"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=r"bad\.yaml") as error:
            parse_recipe(str(tmp_path / "bad.yaml"), [])
        assert ("is there twice" in str(error.value)) == (text.count("seed") == 2 or text.count("a: ") == 2)


def test_shipped_recipes_mean_what_yaml_says(repository):
    for path in sorted(repository.glob("recipes/*/*.yaml")):
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "output_dir" in keys:
            values = {name: value for group in parse_recipe(str(path), []) for name, value in vars(group).items()}
            for name, value in keys.items():
                assert values[name] in (value, [value]), f"{Path(path)}: {name}"
