"""lm-eval on local task files: a model scores the same as hf_lm and as the family it came from."""

import json
import math

import pytest
import torch
from tokenizers import processors

from hf_lm import HfLmConfig, HfLmForSequenceClassification
from hf_lm.cli import main
from hf_lm.evaluation.probe import minimal_pairs, sentences
from hf_lm.generation.prompts import encode_prompt

pytestmark = pytest.mark.slow

TEXT = "Call me Ishmael."
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{opening}}}}"
doc_to_target: "{{{{next}}}}"
generation_kwargs: {{do_sample: false, max_gen_toks: 4}}
filter_list:
  - {{name: start, filter: [{{function: regex, regex_pattern: "([A-Za-z]+)", group_select: 0}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match}}]
"""


ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, moby_dick):
    """A folder with a multiple-choice task and a generation task, made of sentences of the novel."""
    folder = tmp_path_factory.mktemp("tasks")
    text = moby_dick[-120_000:]
    pairs = [pair for examples in minimal_pairs(text, 8).values() for pair in examples]
    choices = [
        {"choices": list(pair if number % 2 else pair[::-1]), "answer": 1 - number % 2}
        for number, pair in enumerate(pairs)
    ]
    words = [sentence.split() for sentence in sentences(text)[:200] if len(sentence.split()) > 12][:30]
    openings = [{"opening": " ".join(some[:10]), "next": some[10]} for some in words]
    templates = (
        ("choice", CHOICE, choices),
        ("generation", GENERATION, openings),
        ("rolling", ROLLING, [{"text": TEXT}]),
    )
    for name, template, items in templates:
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, items)))
        (folder / f"{name}.yaml").write_text(template.format(items=path))
    return folder


def scores(folder, tasks, capsys) -> dict:
    words = ["--tasks", "local_choice", "local_generation", "--include-path", str(tasks), "--json"]
    capsys.readouterr()
    assert main(["lm-eval", str(folder), *words]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_smollm2_scores_the_same_as_hf_lm_and_as_llama(tasks, tmp_path, capsys):
    from helpers.real_checkpoint import smollm2_folder

    source = smollm2_folder()
    assert main(["import", str(source), str(tmp_path / "ours"), "--dtype", "float32"]) == 0
    classes = [json.loads((path / "config.json").read_text())["architectures"] for path in (tmp_path / "ours", source)]
    assert classes == [["HfLmForCausalLM"], ["LlamaForCausalLM"]]
    ours, theirs = (scores(path, tasks, capsys) for path in (tmp_path / "ours", source))
    assert ours == theirs
    assert ours["local_choice"]["acc,none"] > 0.9
    assert 0 < ours["local_generation"]["exact_match,start"] < 1


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_that_is_scored_whole_starts_with_one_bos(tasks, tmp_path, capsys, ends):
    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.tokenization import train_tokenizer

    tokenizer = train_tokenizer(["text"], kind="byte")
    if ends:
        special = [("<|bos|>", 0), ("<|eos|>", 1)]
        around = processors.TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = around
    torch.manual_seed(0)
    config = HfLmConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, zero_init_residual=False)
    model = HfLmForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = ["--tasks", "local_rolling", "--include-path", str(tasks), "--json"]
    assert main(["lm-eval", str(tmp_path), *words]) == 0
    score = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["local_rolling"]["bits_per_byte,none"]
    ids = torch.tensor([encode_prompt(tokenizer, TEXT)])
    nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert math.isclose(score, nats / math.log(2) / len(TEXT), rel_tol=1e-5)


def test_unknown_tasks_are_named(tasks, tmp_path, capsys):
    from hf_lm import HfLmConfig, HfLmForCausalLM
    from hf_lm.tokenization import train_tokenizer

    tokenizer = train_tokenizer(["text"], kind="byte")
    model = HfLmForCausalLM(HfLmConfig(vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["lm-eval", str(tmp_path), "--tasks", "no_such_task", "--include-path", str(tasks)]) == 2
    assert "no_such_task" in capsys.readouterr().err
    assert (
        main(["lm-eval", str(tmp_path), "--tasks", "local_choice", "--include-path", str(tasks), "--limit", "3"]) == 0
    )
    assert "local_choice" in capsys.readouterr().out


def test_a_classifier_is_refused(tasks, tmp_path, capsys):
    HfLmForSequenceClassification(HfLmConfig(hidden_size=32, num_hidden_layers=1)).save_pretrained(tmp_path)
    assert main(["lm-eval", str(tmp_path), "--tasks", "wikitext"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "(HfLmForSequenceClassification), not a language model" in error
