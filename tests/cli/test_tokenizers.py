"""Commands with tokenizers that end a text by eos, and with several chat templates."""

import io
import json

import pytest
from helpers.models import book_tokenizer, small_model
from tokenizers import processors
from transformers import AutoTokenizer

from hf_lm import HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.evaluation.text import score_documents, without_ending
from hf_lm.generation.conversation import first_answers
from hf_lm.generation.prompts import encode_prompt
from hf_lm.hub.doctor import examine

BOS, EOS = "<|bos|>", "<|eos|>"
TEMPLATE = "{% for message in messages %}<|bos|>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same model with each tokenizer, by what its post-processor adds."""
    tokenizer = book_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = small_model(tokenizer)
    paths = {}
    for around in (f"{BOS} $A", f"{BOS} $A {EOS}", f"$A {EOS}"):
        paths[around] = tmp_path_factory.mktemp("model")
        ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
        model.save_pretrained(paths[around])
        tokenizer.save_pretrained(paths[around])
    return paths


@pytest.mark.parametrize("around", [f"{BOS} $A", f"{BOS} $A {EOS}", f"$A {EOS}"])
def test_lm_eval_gets_a_tokenizer_that_leaves_texts_open(folders, around):
    tokenizer = AutoTokenizer.from_pretrained(folders[around])
    opened = without_ending(tokenizer)
    assert (opened is tokenizer) == (EOS not in around)
    assert opened("Call me")["input_ids"] == encode_prompt(tokenizer, "Call me")
    assert tokenizer("Call me")["input_ids"][-1:] == [1] or opened is tokenizer


def test_a_prompt_stays_open_and_a_text_is_scored_once(folders, moby_dick, capsys):
    def results(around: str) -> tuple:
        folder, tokenizer = str(folders[around]), AutoTokenizer.from_pretrained(folders[around])
        assert (tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id) == around.endswith(EOS)
        assert main(["generate", folder, "--prompt", "Call me", "--temperature", "0", "--json"]) == 0
        text = json.loads(capsys.readouterr().out)["text"]
        assert main(["score", folder, "Call me Ishmael.", "--json"]) == 0
        sentence = json.loads(capsys.readouterr().out)[0]["log_probability"]
        whole = score_documents(HfLmForCausalLM.from_pretrained(folder).eval(), tokenizer, [moby_dick[:500]])
        return encode_prompt(tokenizer, "Call me"), text, sentence, whole.loss, sum(whole.tokens)

    plain, closed = results(f"{BOS} $A"), results(f"{BOS} $A {EOS}")
    assert plain == closed and plain[0][0] == 0 and plain[0].count(0) == 1 and 1 not in plain[0]
    ids = results(f"$A {EOS}")[0]
    assert ids == plain[0][1:]
    tokenizer = AutoTokenizer.from_pretrained(folders[f"$A {EOS}"])
    assert encode_prompt(tokenizer, "") == [0]


def test_answers_need_no_pad_token(folders):
    """Llama 2 and its like have none: training on conversations ended in an error after the last step."""
    tokenizer = AutoTokenizer.from_pretrained(folders[f"{BOS} $A"])
    model = HfLmForCausalLM.from_pretrained(folders[f"{BOS} $A"])
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": "."}] for text in ("Call", "Call me")]
    rows = [{"messages": turns} for turns in rows]
    expected = first_answers(model, tokenizer, rows, 8)
    tokenizer.pad_token = None
    assert first_answers(model, tokenizer, rows, 8) == expected == first_answers(model, tokenizer, rows, 8, 1)


@pytest.mark.parametrize("where", ["files", "tokenizer_config.json"])
def test_of_several_chat_templates_the_default_is_used(folders, tmp_path, monkeypatch, capsys, where):
    folder = folders[f"{BOS} $A"]
    HfLmForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = {"default": TEMPLATE, "tool_use": "{{ raise_exception('not this one') }}"}
    if where == "files":
        tokenizer.chat_template = templates
        tokenizer.save_pretrained(tmp_path)
        assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").exists()
    else:
        tokenizer.chat_template = None
        tokenizer.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert [finding.problem for finding in examine(tmp_path) if finding.problem] == []
    answers = []
    for path in (tmp_path, folder):
        monkeypatch.setattr("sys.stdin", io.StringIO("Call me Ishmael.\n"))
        assert main(["chat", str(path), "--max-new-tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()
