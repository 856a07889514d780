"""Every field of OpenAI's protocol, by its own client: it works, or is refused by its name."""

import asyncio
import json

import httpx
import openai
import pytest
import torch
from helpers.serving import running
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatFields
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextFields
from transformers.cli.serving.utils import build_response_parser

from hf_lm.serving import build_app
from hf_lm.serving.answers import Chat
from hf_lm.serving.engine import Piece, Text
from hf_lm.serving.protocol import LABELS

# Qwen's and Hermes' way, shortened
TOOLS = (
    "{% if tools %}{{ tools | tojson }} in <tool_call></tool_call>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{% if message.tool_calls %}"
    "{{ message.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROW = {
    "type": "object",
    "properties": {"kind": {"enum": ["whale", "ship"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "catch", "description": "Catch it.", "parameters": ROW}}
OTHER = {"type": "function", "function": {"name": "flee"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "row", "schema": ROW, "strict": True}}
ASK = {"model": "whale", "prompt": "Call me", "max_tokens": 8, "temperature": 0}
TALK = {"model": "whale", "messages": [{"role": "user", "content": "Call me"}], "max_tokens": 8, "temperature": 0}

# field: (values that work, values that are refused)
BOTH = {
    "model": (["whale"], []),
    "max_tokens": ([3], [0]),
    "temperature": ([0, 1.5], [-1]),
    "top_p": ([0.5], [0]),
    "frequency_penalty": ([-2, 1.5], [-3]),
    "presence_penalty": ([-2, 1.5], [3]),
    "logit_bias": ([{"70": 100}], [{"300": 1}]),
    "n": ([2], [0]),
    "seed": ([-1], [1.5]),
    "stop": ([[], "e", ["e", "x"]], [[""]]),
    "stream": ([True, False], [1]),
    "stream_options": ([], [{"include_usage": True}]),  # without stream
    "user": (["me"], [5]),
}
TEXT = BOTH | {
    "prompt": (["a", ["a", "b"], [1, 2], [[1, 2], [3]]], [[300]]),
    "echo": ([True], [1]),
    "logprobs": ([0, 5], [6]),
    "best_of": ([1], [2]),
    "suffix": ([""], ["!"]),
}
CHAT = BOTH | {
    "messages": (
        [
            [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "b"}],
            [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "catch", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "1", "content": "b"}],
        ],
        [
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}],
            [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "a", "arguments": "{"}}]}],
            [{"role": "assistant", "audio": {"id": "a"}}],
        ],
    ),
    "max_completion_tokens": ([3], [0]),
    "logprobs": ([True, False], [5]),
    "top_logprobs": ([], [2]),  # without logprobs
    "response_format": ([{"type": "text"}, {"type": "json_object"}, FORMAT], [{"type": "json_schema"}, {"type": "grammar"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}]),
    "tools": ([[TOOL, OTHER]], [5, [{"type": "custom", "custom": {"name": "a"}}]]),
    "tool_choice": (["none"], ["required", "any", {"type": "allowed_tools", "allowed_tools": {}}]),  # without tools
    "parallel_tool_calls": ([True, False], [2]),
    "functions": ([[]], [[{"name": "a"}]]),
    "function_call": (["none"], ["auto"]),
    "metadata": ([{}], [{"a": "b"}]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "audio": ([], [{"voice": "a", "format": "wav"}]),
    "moderation": ([], [{}]),
    "prediction": ([], [{"type": "content", "content": "a"}]),
    "prompt_cache_key": (["a"], [5]),
    "prompt_cache_options": ([], [{}]),
    "prompt_cache_retention": ([], ["24h"]),
    "reasoning_effort": ([], ["low"]),
    "safety_identifier": (["a"], [5]),
    "service_tier": (["auto", "default"], ["flex"]),
    "store": ([False], [True]),
    "verbosity": (["medium"], ["high"]),
    "web_search_options": ([], [{}]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tools_app(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    tokenizer.save_pretrained(folder)
    copy = type(tokenizer).from_pretrained(folder)
    copy.chat_template = TOOLS
    return build_app("whale", model, copy, api_key="sesame")


@pytest.fixture(scope="module")
def client(tools_app):
    with running(tools_app) as address:
        yield openai.OpenAI(base_url=f"{address.base_url}/v1", api_key="sesame", max_retries=0)


def complete(client, **settings):
    return client.completions.create(**ASK | settings)


def talk(client, **settings):
    return client.chat.completions.create(**TALK | settings)


@pytest.mark.parametrize(("path", "ask", "fields", "known"), [("/completions", ASK, TEXT, TextFields), ("/chat/completions", TALK, CHAT, ChatFields)])  # fmt: skip
def test_every_field_works_or_is_refused_by_its_name(client, path, ask, fields, known):
    assert fields.keys() == known.__annotations__.keys()  # a new release of openai may bring new ones
    assert fields.keys() >= LABELS - {"prompt_cache_key", "safety_identifier"}
    for field, (works, refused) in fields.items():
        for value in [None, *works]:
            if value is None and field in ("prompt", "messages", "max_tokens"):
                continue
            body = ask | {"max_tokens": 2, field: value}
            if body.get("stream"):
                list(client.post(path, body=body, cast_to=object, stream=True, stream_cls=openai.Stream[object]))
            else:
                assert client.post(path, body=body, cast_to=object)["choices"], (field, value)
        for value in refused:
            with pytest.raises(openai.BadRequestError) as caught:
                client.post(path, body=ask | {field: value}, cast_to=object)
            assert caught.value.param == field and field in caught.value.message, (field, value)


def test_text_ends_before_the_stop_string(client):
    plain = complete(client, max_tokens=30).choices[0].text
    assert len(plain) > 12
    for stop in (plain[5:9], [plain[7:9], plain[6:10], "never there"], plain[-2:]):
        end = min(place for one in ([stop] if isinstance(stop, str) else stop) if (place := plain.find(one)) >= 0)
        whole = complete(client, max_tokens=30, stop=stop, logprobs=0).choices[0]
        assert (whole.text, whole.finish_reason) == (plain[:end], "stop")
        assert all(offset < end for offset in whole.logprobs.text_offset)
        chunks = list(complete(client, max_tokens=30, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == plain[:end]
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert complete(client, max_tokens=30, stop=[]).choices[0].text == plain
    forced = {"max_tokens": 6, "logit_bias": {"70": 100}}  # the same letter again and again
    spoken = talk(client, **forced).choices[0].message.content
    assert len(spoken) == 6
    assert talk(client, **forced, stop=spoken[:3]).choices[0].message.content == ""
    assert talk(client, **forced, stop=spoken + "!").choices[0].message.content == spoken  # held back, then released


def test_text_grows_by_whole_characters(tokenizer):
    words = "wh\u00e4le \u9be8 \U0001f40b\u200d ahoy"
    text = Text(tokenizer, stops=["y!"])
    parts = [text.add(token) for token in tokenizer(words, add_special_tokens=False)["input_ids"]]
    assert "\ufffd" not in "".join(parts) and len(parts) > len(words) and not "".join(parts).endswith("y")
    assert "".join(parts) + text.add(None) == words
    broken = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize("\u9be8")[0])] * 20  # the first byte of three
    text = Text(tokenizer)
    assert sum(bool(text.add(token)) for token in broken) >= 3  # bytes that never become a character are not held back
    text.add(None)
    assert text.length == 20


def test_log_probabilities_are_the_models(client, model, tokenizer):
    answer = complete(client, echo=True, logprobs=3, temperature=0.7, seed=3, n=2)
    ids = tokenizer("Call me")["input_ids"]
    for choice in answer.choices:
        scores = choice.logprobs
        assert choice.text.startswith("Call me") and len(scores.tokens) == len(ids) + 8
        assert scores.token_logprobs[0] is None and scores.text_offset == sorted(scores.text_offset)
        assert scores.text_offset[len(ids)] == len("Call me")  # vllm#47815: they go on where the prompt ends
        full = ids + [
            tokenizer.convert_tokens_to_ids(tokenizer.tokenize(token))[0] for token in scores.tokens[len(ids) :]
        ]
        if tokenizer.decode(full) != choice.text:
            continue  # a token that is part of a character has no text of its own
        with torch.no_grad():
            expected = model(torch.tensor([full])).logits[0].log_softmax(-1)
        for place in range(1, len(full)):
            assert scores.token_logprobs[place] == pytest.approx(expected[place - 1, full[place]].item(), abs=1e-4)
            best = sorted(scores.top_logprobs[place].values(), reverse=True)[:3]  # the chosen one may be a fourth
            assert scores.top_logprobs[place][scores.tokens[place]] == scores.token_logprobs[place]
            assert best == pytest.approx(expected[place - 1].topk(3).values.tolist(), abs=1e-4)
    only = complete(client, echo=True, logprobs=0, max_tokens=0)
    assert only.choices[0].text == "Call me" and only.usage.completion_tokens == 0
    spoken = talk(client, logprobs=True, top_logprobs=2).choices[0]
    assert len(spoken.logprobs.content) == 8
    for token in spoken.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob <= 0 and len(token.top_logprobs) == 2
        assert bytes(token.bytes).decode(errors="replace") in (token.token, "\ufffd" * len(token.bytes))
    chunks = list(talk(client, logprobs=True, stream=True))
    streamed = [
        one.logprob for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([token.logprob for token in spoken.logprobs.content], abs=1e-5)


def test_seed_repeats_an_answer_and_choices_differ(client):
    settings = {"temperature": 1, "n": 3, "max_tokens": 12}
    first, second = (complete(client, **settings, seed=7) for _ in range(2))
    assert [one.text for one in first.choices] == [one.text for one in second.choices]
    assert len({one.text for one in first.choices}) == 3 and [one.index for one in first.choices] == [0, 1, 2]
    assert first.usage.completion_tokens == 36
    assert complete(client, **settings, seed=8).choices[0].text != first.choices[0].text
    chunks = list(talk(client, **settings, seed=7, stream=True))
    spoken = talk(client, **settings, seed=7)
    for choice in spoken.choices:
        parts = [one.delta.content or "" for chunk in chunks for one in chunk.choices if one.index == choice.index]
        assert "".join(parts) == choice.message.content
    prompts = complete(client, prompt=["Call me", "The whale"], n=2, seed=7, temperature=1)
    assert len(prompts.choices) == 4
    assert prompts.choices[2].text == complete(client, prompt="The whale", seed=7, temperature=1).choices[0].text


def test_penalties_are_openais(client, tokenizer):
    bias = {"70": 40, "71": 38}
    same = tokenizer.decode([70])
    assert complete(client, logit_bias=bias).choices[0].text == same * 8
    for penalty in ("frequency_penalty", "presence_penalty"):
        text = complete(client, logit_bias={"70": 40, "71": 39}, **{penalty: 2}).choices[0].text
        assert text.count(same) < 8


def test_streams_end_as_the_protocol_says(client):
    usage = {"include_usage": True}
    for ask, path in ((ASK, "completions"), (TALK, "chat/completions")):
        body = ask | {"stream": True, "stream_options": usage}
        with httpx.stream("POST", f"{client.base_url}{path}", json=body, headers=client.auth_headers) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 8
        assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events[:-1])
        assert [event["choices"][0]["finish_reason"] for event in events[:-1]].count("length") == 1
        assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_json_schema(client, stream):
    def answer(**settings):
        settings = {"max_tokens": 200, "temperature": 1, "seed": 3} | settings
        if not stream:
            return talk(client, **settings).choices[0]
        chunks = [chunk.choices[0] for chunk in talk(client, stream=True, **settings)]
        chunks[-1].message = openai.types.chat.ChatCompletionMessage(
            role="assistant",
            content="".join(chunk.delta.content or "" for chunk in chunks),
            tool_calls=[call.model_dump() for chunk in chunks for call in chunk.delta.tool_calls or []] or None,
        )
        return chunks[-1]

    choice = answer(response_format=FORMAT)
    row = json.loads(choice.message.content)
    assert row.keys() == {"kind", "count"} and row["kind"] in ("whale", "ship") and 0 <= row["count"] <= 99
    assert choice.finish_reason == "stop"
    for must in ("required", {"type": "function", "function": {"name": "catch"}}):
        choice = answer(tools=[TOOL], tool_choice=must)
        (call,) = choice.message.tool_calls
        assert call.function.name == "catch" and json.loads(call.function.arguments).keys() == {"kind", "count"}
        assert choice.finish_reason == "tool_calls" and not choice.message.content
    cut = answer(response_format={"type": "json_object"}, max_tokens=5)
    assert cut.message.content.startswith("{") and cut.finish_reason in ("length", "stop")
    cut = answer(tools=[TOOL], tool_choice="required", max_tokens=5)  # what is no call yet is given as text
    assert cut.message.content.startswith("{") and not cut.message.tool_calls and cut.finish_reason == "length"


def test_tools_need_a_template_that_takes_them(chat, client):
    plain = openai.OpenAI(base_url=f"{chat.base_url}/v1", api_key="none", max_retries=0)
    for settings in ({}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError, match="tools: the model's chat template does not take tools"):
            talk(plain, tools=[TOOL], **settings)
    seen = talk(client, tools=[TOOL]).usage.prompt_tokens
    assert (
        seen > talk(client, tools=[TOOL], tool_choice="none").usage.prompt_tokens == talk(client).usage.prompt_tokens
    )
    with pytest.raises(openai.BadRequestError, match="tool_choice: there is no tool 'sail'"):
        talk(client, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "sail"}})
    with pytest.raises(openai.BadRequestError, match="response_format: not together"):
        talk(client, tools=[TOOL], response_format=FORMAT)
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}
    with pytest.raises(openai.BadRequestError, match="tools: strict"):
        talk(client, tools=[strict])


@pytest.mark.parametrize("parallel", [True, False])
def test_tool_calls_are_read_from_the_text(tokenizer, parallel):
    family = type("Qwen", (), {"config": type("Config", (), {"model_type": "qwen2"})})
    prompt = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    calls = ['<tool_call>\n{"name": "catch", "arguments": {"count": 1}}\n</tool_call>'] * 2
    text = "<think>\nHm.\n</think>\n\nAye.\n" + "\n".join(calls)
    choice = Chat(tokenizer, 0, parser=build_response_parser(tokenizer, family, prompt), parallel=parallel)
    chunks = choice.begin()
    for i in range(0, len(text), 7):
        chunks += choice.add(Piece(text[i : i + 7]))
    chunks += choice.add(Piece(finish="stop"))
    message = choice.whole()["message"]
    assert [call["function"] for call in message["tool_calls"]] == [{"name": "catch", "arguments": '{"count": 1}'}] * (1 + parallel)  # fmt: skip
    assert message["content"].strip() == "Aye." and message["reasoning_content"].strip() == "Hm."
    assert choice.whole()["finish_reason"] == chunks[-1]["finish_reason"] == "tool_calls"
    assert sum("tool_calls" in chunk["delta"] for chunk in chunks) == 1 + parallel


def test_api_key(client):
    wrong = openai.OpenAI(base_url=client.base_url, api_key="simsim", max_retries=0)
    for call in (wrong.models.list, lambda: complete(wrong), lambda: talk(wrong)):
        with pytest.raises(openai.AuthenticationError, match="API key"):
            call()
    assert client.models.list().data[0].id == "whale"


def test_requests_are_answered_together(tools_app, client, model):
    steps = []
    hook = model.register_forward_hook(lambda module, arguments, outputs: steps.append(outputs.logits.shape[0]))

    async def ask_all() -> list:
        many = openai.AsyncOpenAI(base_url=client.base_url, api_key="sesame", max_retries=0)
        asks = [many.completions.create(**ASK | {"prompt": f"{i} Call me", "max_tokens": 24 + i}) for i in range(24)]
        return await asyncio.gather(*asks)

    try:
        together = asyncio.run(ask_all())
    finally:
        hook.remove()
    assert max(steps) > 12 and len(steps) < 24 * 24 / 4
    for i in (0, 7, 23):  # and each answer is what it would be alone
        assert (
            together[i].choices[0].text == complete(client, prompt=f"{i} Call me", max_tokens=24 + i).choices[0].text
        )
        assert together[i].usage.completion_tokens == 24 + i


def test_a_short_answer_does_not_wait_for_a_long_one(client, model):
    sizes = []
    hook = model.register_forward_hook(lambda module, arguments, outputs: sizes.append(outputs.logits.shape[0]))
    try:
        with complete(client, max_tokens=900, stream=True) as long:
            next(iter(long))
            assert complete(client, max_tokens=2).usage.completion_tokens == 2
    finally:
        hook.remove()
    assert 2 in sizes and len(sizes) < 900


def test_a_failure_of_the_model_is_said_and_does_not_end_the_server(client, model):
    def fail(module, arguments):
        raise RuntimeError("no memory is left")

    hook = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.InternalServerError, match="no memory is left"):
            complete(client)
        with pytest.raises(openai.APIError, match="no memory is left"):
            list(talk(client, stream=True))
    finally:
        hook.remove()
    assert complete(client).usage.completion_tokens == 8
