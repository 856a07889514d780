"""The Modelfile beside an exported GGUF file: its TEMPLATE, rendered, is what the chat template gives."""

import re

import pytest
from transformers import GenerationConfig

from hf_lm.cli import main
from hf_lm.interop.modelfile import chat_format, modelfile
from hf_lm.tasks.chat import CHAT_TEMPLATE

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
BRACES = (
    "{{ bos_token }}{% for m in messages %}{{ '{{' + m.role + '}} \"' + m.content + '\"' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}} \"' }}{% endif %}"
)
CONVERSATIONS = [
    [("user", "question")],
    [("system", "instruction"), ("user", "  two\n lines\n")],
    [("user", "{{ a }}"), ("assistant", "b"), ("user", "c")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def parse(text: str) -> list[tuple[str, str]]:
    """The instructions of a Modelfile, as Ollama reads them: a value goes to the line's end or is in quotes."""
    instruction = re.compile(r'#[^\n]*\n|([A-Z]+)[ \t]+(?:"""(.*?)"""|"([^"]*)"|((?:[^"\n][^\n]*)))\n', re.DOTALL)
    found, position = [], 0
    while position < len(text):
        match = instruction.match(text, position)
        assert match, text[position:]
        if match[1] == "PARAMETER":
            name, value = match[4].split(" ", 1)
            found.append((name, value.strip('"')))
        elif match[1]:
            found.append((match[1], next(group for group in match.groups()[1:] if group is not None)))
        position = match.end()
    return found


def render_go(template: str, turns: list[tuple[str, str]]) -> str:
    """The part of Go's templates that is used: conditions, a loop, fields and strings."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    tokens = [(index % 2 == 1, part) for index, part in enumerate(parts)]
    scope = {".System": "\n\n".join(content for role, content in turns if role == "system")}

    def block(start: int, scope: dict, shown: bool) -> tuple[str, int]:
        """Render up to the `else` or `end` of this block."""
        text, index = "", start
        while index < len(tokens):
            is_action, part = tokens[index]
            if not is_action:
                text += part
            elif part == "end" or part.startswith("else "):
                break
            elif part == "range .Messages":
                rendered = [block(index + 1, {".Role": role, ".Content": content}, shown) for role, content in turns]
                text += "".join(one for one, _ in rendered)
                index = block(index + 1, {".Role": "", ".Content": ""}, False)[1]
            elif part.startswith("if "):
                taken = False
                while True:
                    condition = tokens[index][1].removeprefix("else ").removeprefix("if ")
                    operator, *rest = condition.split()
                    value = not scope[rest[0]] if operator == "not" else scope[rest[0]] == rest[1].strip('"')
                    branch, index = block(index + 1, scope, shown and value and not taken)
                    text += branch
                    taken = taken or value
                    if tokens[index][1] == "end":
                        break
            else:
                text += part[1:-1] if part.startswith('"') else scope[part]
            index += 1
        return (text if shown else ""), index

    text, end = block(0, scope, True)
    assert end == len(tokens)
    return text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, SMOLLM2, BRACES], ids=["ours", "smollm2", "braces"])
@pytest.mark.parametrize("turns", CONVERSATIONS, ids=len)
def test_its_template_is_the_chat_template(template, turns, tokenizer_with):
    tokenizer = tokenizer_with(template)
    (go,) = [
        value
        for name, value in parse(modelfile("M", "m.gguf", tokenizer, GenerationConfig(), [1]))
        if name == "TEMPLATE"
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render_go(go, turns) == wanted.removeprefix("<|bos|>")  # which llama.cpp puts in front of a text


@pytest.fixture
def tokenizer_with(moby_dick):
    from hf_lm.tokenization import train_tokenizer

    def build(template: str):
        tokenizer = train_tokenizer([moby_dick[:10_000]], 300)
        tokenizer.chat_template = template
        return tokenizer

    return build


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% if tools %}",
    ],
)
def test_a_template_that_does_more_is_left_to_the_file(template, tokenizer_with):
    tokenizer = tokenizer_with(template)
    assert chat_format(tokenizer) is None
    text = modelfile("M", "m.gguf", tokenizer, GenerationConfig(), [1])
    assert "TEMPLATE" not in dict(parse(text)) and "# No TEMPLATE: " in text


def test_it_says_where_to_stop_and_how_to_sample(checkpoint, tmp_path):
    settings = GenerationConfig(
        eos_token_id=[1, 2, 40],
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        repetition_penalty=1.1,
        max_new_tokens=99,
    )
    source = checkpoint()
    settings.save_pretrained(source)
    assert main(["export", str(source), str(tmp_path / "v1 a.gguf")]) == 0
    text = (tmp_path / "v1 a.Modelfile").read_text()
    assert text.startswith("# ollama create NAME -f v1 a.Modelfile\n")
    found = parse(text)
    assert found[0] == ("FROM", "./v1 a.gguf")
    assert [value for name, value in found if name == "stop"] == ["<|eos|>", "<|pad|>"]
    sampling = {"temperature": "0.7", "top_k": "20", "top_p": "0.9", "repeat_penalty": "1.1", "num_predict": "99"}
    assert dict(found[-5:]) == sampling

    assert main(["export", str(source), str(tmp_path / "folder"), "--to", "gguf"]) == 0
    assert ("FROM", "./model.gguf") in parse((tmp_path / "folder" / "Modelfile").read_text())


def test_greedy_decoding_is_temperature_zero(tokenizer_with):
    text = modelfile("M", "m.gguf", tokenizer_with(CHAT_TEMPLATE), GenerationConfig(do_sample=False, top_k=5), [])
    assert parse(text)[-1] == ("temperature", "0") and "top_k" not in text
    tokenizer = tokenizer_with(None)
    assert parse(modelfile("M", "m.gguf", tokenizer, GenerationConfig(), [1])) == [
        ("FROM", "./m.gguf"),
        ("stop", "<|eos|>"),
    ]
