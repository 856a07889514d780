"""`hf-lm serve`: OpenAI's protocol over real HTTP, refusals with a reason, 32 clients at once."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import reduce

import httpx
import openai
import psutil
import pytest

from hf_lm.cli import main
from hf_lm.serving import MAX_BODY

CONTEXT = 1024  # of conftest's model
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DEEP = reduce(lambda inner, _: {"a": inner}, range(700), 1)  # Python's limit is 1000


def refused(response, status: int, reason: str) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status and re.search(reason, error["message"]), error


def test_openai_client_gets_whole_and_streamed_answers(text, chat):
    client = openai.OpenAI(base_url=f"{text.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["whale"]
    ask = {"model": "whale", "prompt": "Call me", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**ask)
    chunks = list(client.completions.create(**ask, stream=True))
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) != ""
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12 and chunks[-1].usage is None
    client = openai.OpenAI(base_url=f"{chat.base_url}/v1", api_key="none", max_retries=0)
    ask = {"model": "whale", "messages": [{"role": "user", "content": "Call me"}], "max_tokens": 12, "temperature": 0}
    whole, chunks = client.chat.completions.create(**ask), list(client.chat.completions.create(**ask, stream=True))
    assert whole.choices[0].message.content == "".join(chunk.choices[0].delta.content or "" for chunk in chunks) != ""
    with pytest.raises(openai.NotFoundError, match="only 'whale' is served"):
        client.chat.completions.create(**ask | {"model": "gpt2"})


def test_settings_of_the_request_are_used(text, tokenizer):
    def answers(**settings):
        ask = {"prompt": "Call me", "max_tokens": 8, **settings}
        return {text.post(TEXT, json=ask).json()["choices"][0]["text"] for _ in range(4)}

    assert len(answers(temperature=1.0)) > 1
    assert len(answers(temperature=1e-300)) == len(answers(temperature=0)) == 1
    assert len(answers(generation_config='{"max_new_tokens": 8, "do_sample": true, "top_k": 1}')) == 1
    assert answers(logit_bias={"70": 100}).pop().count(tokenizer.decode([70])) == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None), ("prompt", 5), ("prompt", ["a", 1]), ("prompt", [[1, "a"]]), ("prompt", []), ("prompt", [[]]),
        ("prompt", [300]), ("prompt", [-1]), ("prompt", ["a"] * 129), ("max_tokens", 0), ("stream_options", {"a": 1}),
        ("max_tokens", "9"), ("max_tokens", 1.5), ("max_tokens", 10**30), ("temperature", -1), ("temperature", "hot"),
        ("top_p", 0), ("top_p", 1.5), ("stop", [""]), ("stop", 5), ("stop", ["a"] * 5), ("stop", "a" * 300),
        ("seed", 2**70), ("seed", "a"), ("frequency_penalty", -3), ("presence_penalty", 3), ("logit_bias", {"1": 1e9}), ("suffix", 4),
        ("stream", "yes"), ("n", 129), ("n", 0), ("logprobs", 6), ("logprobs", -1), ("echo", 1), ("generation_config", "{"), ("generation_config", "[]"),
        ("generation_config", {"top_k": 1}), ("generation_config", '{"num_beams": 100}'),
        ("generation_config", '{"custom_generate": "owner/name"}'), ("generation_config", '{"temperature": NaN}'),
        ("new", 1), ("\ud800", 1),
    ],
)  # fmt: skip
def test_malformed_field_is_refused_by_its_name(text, field, value):
    for stream in ({}, {"stream": True}):
        body = json.dumps({"prompt": "a", "max_tokens": 2} | stream | {field: value})
        response = text.post(TEXT, content=body, headers={"content-type": "application/json"})
        refused(response, 400, "surrogate" if field == "\ud800" else field)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}']
)
def test_malformed_body_is_refused(text, body):
    response = text.post(TEXT, content=body, headers={"content-type": "application/json"})
    refused(response, response.status_code, ".")
    assert 400 <= response.status_code < 500


def test_tokens_that_do_not_exist_are_refused(text):
    for bias in ({"300": 1}, {"-1": 1}, {"a": 1}):
        refused(text.post(TEXT, json={"prompt": "a", "logit_bias": bias}), 400, "logit_bias")
    assert text.post(TEXT, json={"prompt": "a", "logit_bias": {}, "max_tokens": 1}).status_code == 200


def test_chat_is_refused_where_there_is_no_template(text):
    refused(text.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]}), 400, "no chat template.*/v1/comp")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", None), ("messages", "a"), ("messages", []), ("messages", [[]]), ("messages", [{}]), ("messages", [5]),
        ("messages", [{"role": "user", "content": 5}]), ("messages", [{"role": "user", "content": [{"text": "a"}]}]),
        ("messages", [{"role": "system", "content": "a"}]), ("messages", [{"role": "user", "content": "\ud800"}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"function": {}}]}]), ("max_completion_tokens", 0),
        ("chat_template_kwargs", 5), ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", {"padding": "max_length", "max_length": 10**12}), ("tools", 5),
        ("chat_template_kwargs", DEEP), ("messages", [{"role": "user", "content": [DEEP]}]),
    ],
)  # fmt: skip
def test_malformed_chat_is_refused(chat, field, value):
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | {field: value})
    response = chat.post(CHAT, content=body, headers={"content-type": "application/json"})
    refused(response, response.status_code, ".")
    assert 400 <= response.status_code < 500


def test_over_long_prompts_are_refused_before_they_cost_anything(text, chat):
    refused(
        text.post(TEXT, json={"prompt": "whale " * CONTEXT}),
        400,
        rf"\d+ tokens; the model takes from 1 to {CONTEXT - 1}",
    )
    refused(text.post(TEXT, json={"prompt": "whale " * 500_000}), 400, f"3000000 characters; .* {CONTEXT} tokens")
    long = [{"role": "user", "content": [{"type": "text", "text": "whale " * 500_000}]}]
    refused(chat.post(CHAT, json={"messages": long}), 400, f"characters; .* {CONTEXT} tokens")
    refused(text.post(TEXT, json={"prompt": "a" * MAX_BODY}), 413, f"at most {MAX_BODY}")
    chunked = text.post(TEXT, content=(b"a" * 65536 for _ in range(100)), headers={"content-type": "application/json"})
    assert chunked.status_code == 413
    prompt = {"prompt": "Call me", "max_tokens": 10**6, "stream": True, "stream_options": {"include_usage": True}}
    with text.stream("POST", TEXT, json=prompt) as answer:  # an answer ends where the context ends
        last, usage, done = [line.removeprefix("data: ") for line in answer.iter_lines() if line][-3:]
    assert json.loads(usage)["usage"]["total_tokens"] == CONTEXT and done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] == "length"


def test_nothing_but_the_model_can_be_reached(text):
    assert text.get("/health").json() == {"status": "ok"}
    assert '"ready"' in text.post("/load_model", json={"model": "whale"}).text  # `transformers chat` starts so
    for name in ("owner/name", 5, None, ["whale"]):
        refused(text.post("/load_model", json={"model": name}), 404, "only 'whale' is served")
        if name is not None:
            refused(text.post(TEXT, json={"prompt": "a", "model": name}), 404, "only 'whale' is served")
    for path in ("/reset", "/v1/audio/transcriptions", "/v1/systemone"):
        refused(text.post(path, json={"model": "owner/name"}), 404, "Not Found")
    for path in ("/docs", "/openapi.json", "/../etc/passwd"):
        refused(text.get(path), 404, "Not Found")
    refused(text.get(TEXT), 405, "Not Allowed")


def test_answers_nobody_waits_for_are_given_up(text, model):
    steps = []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    try:
        for _ in range(12):
            with text.stream("POST", TEXT, json={"prompt": "a", "max_tokens": CONTEXT, "stream": True}) as answer:
                next(answer.iter_lines())
        assert text.post(TEXT, json={"prompt": "a", "max_tokens": 1}).status_code == 200  # its turn comes after theirs
    finally:
        hook.remove()
    assert len(steps) < CONTEXT / 2


def test_serve_refuses_wrong_arguments(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2 and "config.json" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "70000"]) == 2 and "--port" in capsys.readouterr().err


@contextmanager
def command(folder):
    """The command itself in a process of its own; yields the process and its address."""
    words = [sys.executable, "-m", "hf_lm", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, next(re.search(r"http://[\d.]+:\d+", line)[0] for line in process.stderr if "http:" in line)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
def test_interrupt_ends_the_server_while_it_answers(folder):
    with command(folder) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        listening = {
            link.laddr.ip for link in psutil.Process(process.pid).net_connections() if link.status == "LISTEN"
        }
        assert listening == {"127.0.0.1"}
        ask = {"prompt": "a", "max_tokens": CONTEXT, "stream": True}
        with httpx.stream("POST", address + TEXT, json=ask, timeout=60) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGINT)
            assert process.wait(15) in (0, 130)
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_32_clients_stream_for_two_minutes(folder):
    async def visit(client: httpx.AsyncClient, number: int, end: float) -> int:
        """One client: asks again and again; now and then something wrong, or it leaves before the end."""
        done, length = 0, 24 + number % 8  # about the same for all: a short answer does not wait for a long one
        while time.monotonic() < end:
            ask = {"prompt": f"{number} Call me", "max_tokens": length, "temperature": 0.9, "stream": True}
            ask["stream_options"] = {"include_usage": True}
            async with client.stream("POST", TEXT, json=ask) as answer:
                assert answer.status_code == 200
                parts = answer.aiter_bytes()
                if done % 10 == 9:
                    await anext(parts)
                else:
                    received = [part async for part in parts]
                    assert len(received) > 1
                    lines = b"".join(received).split(b"\n\n")[
                        :-1
                    ]  # (httpx's own lines end at U+0085 and the like too)
                    assert lines.pop() == b"data: [DONE]"
                    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]
                    assert not [event for event in events if "error" in event]
                    assert events[-1]["usage"]["completion_tokens"] == length
            if done % 10 == 5:
                for wrong in ({"prompt": "a" * 1_000_000}, {"prompt": 5}, {"prompt": "whale " * CONTEXT}):
                    assert (await client.post(TEXT, json=wrong)).status_code == 400
            done += 1
        return done

    async def visit_all(address: str, seconds: float) -> list[int]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
            end = time.monotonic() + seconds
            return await asyncio.gather(*(visit(client, number, end) for number in range(32)))

    with command(folder) as (process, address):
        server = psutil.Process(process.pid)
        asyncio.run(visit_all(address, 15))
        before = server.memory_info().rss
        counts = asyncio.run(visit_all(address, 120))
        grown = (server.memory_info().rss - before) / 2**20
        print(f"{sum(counts)} answers, {min(counts)} to {max(counts)} a client; {before / 2**20:.0f} {grown:+.1f} MiB")
        assert min(counts) > 0.5 * max(counts) and min(counts) >= 10
        assert grown < 32
        assert server.num_threads() < 64 and len(server.net_connections()) < 40
