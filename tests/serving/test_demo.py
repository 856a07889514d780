"""`hf-lm demo`: the page in a real browser, as a person uses it: type, click, see the answer grow."""

import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.browser import CONTRAST, FLAGS, browser
from helpers.models import book_tokenizer, save_small_model

from hf_lm import HfLmForSequenceClassification

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


# Without an eos, answers are as long as they may be.
SETTINGS = {"hidden_size": 64, "max_position_embeddings": 512, "initializer_range": 0.02, "bos_token_id": None, "eos_token_id": None}  # fmt: skip


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that generates, chats and translates."""
    tokenizer = book_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|en-de|>"]}, replace_extra_special_tokens=False)
    return Path(save_small_model(tmp_path_factory.mktemp("talker"), tokenizer, **SETTINGS))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    labels = {"id2label": {0: "sea", 1: "land"}, "label2id": {"sea": 0, "land": 1}}
    folder = tmp_path_factory.mktemp("classifier")
    return Path(save_small_model(folder, book_tokenizer(), HfLmForSequenceClassification, **SETTINGS, **labels))


class Page:
    """A page in headless Chromium, by its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.numbers, self.requests, self.errors = socket, itertools.count(1), [], []

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=30))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def value(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 30):
        """The first value of an expression that is not empty."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"never true: {expression}\n{self.value('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def watch(self, expression: str) -> None:
        """From now on `seen` holds all values that an expression has had, also those between two looks from here."""
        self.value("clearInterval(window.watcher); window.seen = new Set()")
        self.value(f"window.watcher = setInterval(() => seen.add({expression}), 5)")

    def found(self, label: str, role: str = "") -> str:
        """The middle of the button or tab of that name, if it can be clicked at, as JavaScript."""
        return f"""(() => {{
            for (const node of document.querySelectorAll("button")) {{
                if (node.innerText.trim() !== {json.dumps(label)} || (node.role ?? "") !== "{role}") continue;
                node.scrollIntoView({{block: "center"}});
                const box = node.getBoundingClientRect();
                const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
                if (!node.disabled && node.contains(document.elementFromPoint(x, y))) return [x, y];
            }}
        }})()"""

    def click(self, label: str, role: str = "") -> None:
        x, y = self.wait(self.found(label, role))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tab(self, label: str) -> None:
        self.click(label, "tab")
        chosen = f'[...document.querySelectorAll("[role=tab]")].find(tab => tab.innerText.trim() === "{label}")'
        self.wait(f'{chosen}.ariaSelected === "true" && {FIELDS}.length > 0')

    def type(self, text: str) -> None:
        """Type into the first text field."""
        self.wait(
            f"(() => {{ const field = {FIELDS}[0]; field?.focus(); return document.activeElement === field; }})()"
        )
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int, text: str = "") -> None:
        keys = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **keys)


SLIDER = '[...document.querySelectorAll("input[type=range]")].find(slider => slider.offsetParent)'
FIELDS = '[...document.querySelectorAll("textarea:not([disabled])")].filter(field => field.offsetParent)'
LAST = '[...document.querySelectorAll("textarea")].filter(field => field.offsetParent).at(-1).value'


@contextmanager
def opened(folder, profile):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    server = subprocess.Popen([sys.executable, "-m", "hf_lm", "demo", str(folder), "--port", str(port)])
    driven = None
    try:
        for _ in range(600):
            assert server.poll() is None
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        driven = subprocess.Popen(
            [browser(), *FLAGS, "--window-size=1000,1400", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        devtools = next(re.search(r"ws://([^/]+)", line)[1] for line in driven.stderr if "DevTools listening" in line)
        with urllib.request.urlopen(f"http://{devtools}/json/list") as response:
            target = next(page for page in json.load(response) if page["type"] == "page")
        from websockets.sync.client import connect

        with connect(target["webSocketDebuggerUrl"], max_size=None) as link:
            page = Page(link)
            for domain in ("Network", "Runtime", "Page"):
                page.call(f"{domain}.enable")
            page.call("Page.navigate", url=address)
            yield page
        assert page.errors == []
        assert {url for url in page.requests if not url.startswith((address, "data:", "blob:"))} == set()
    finally:
        for process in (driven, server):
            if process is not None:
                process.terminate()
                process.wait(30)


@pytest.mark.slow
def test_person_generates_chats_translates_and_sees_surprise(talker, tmp_path):
    with opened(talker, tmp_path / "profile") as page:
        page.tab("Generate")
        page.type("Call me")
        page.watch(LAST)
        page.click("Generate")
        page.wait("seen.size > 3")  # the text grows while one looks on
        page.click("Stop")
        page.wait(page.found("Generate"))
        stopped = page.value(LAST)
        time.sleep(0.5)
        assert page.value(LAST) == stopped and stopped.startswith("Call me")
        page.wait(f"(() => {{ {SLIDER}.focus(); return document.activeElement === {SLIDER}; }})()")
        page.press("Home", 36)  # one new token at most
        page.wait(f'{SLIDER}.value === "1"')
        page.click("Generate")
        page.wait(f'{LAST}.startsWith("Call me") && {LAST}.length < {len(stopped)}')
        page.wait(page.found("Generate"))
        assert len(page.value(LAST)) < len(stopped)

        page.tab("Chat")
        answers = '[...document.querySelectorAll("[data-testid=bot]")].map(node => node.innerText)'
        for turn, message in enumerate(("Hello", "Who are you?")):
            page.type(message)
            page.watch(f"{answers}[{turn}]")
            page.press("Enter", 13, "\r")
            page.wait("seen.size > 3")
            page.wait('!document.querySelector(".stop-button")?.offsetParent')

        page.tab("Translate")
        page.type("Call me")
        page.click("Translate")
        assert page.wait(LAST)

        page.tab("Surprise")
        page.type("Call me <b>Ishmael</b>")
        page.click("Show")
        tokens = page.wait('[...document.querySelectorAll("span[title$=bits]")].map(node => node.innerText)')
        assert "".join(tokens) == "Call me <b>Ishmael</b>"
        for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(15, 15, 17)")):
            page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            page.wait(f"getComputedStyle(document.body).backgroundColor === {json.dumps(paper)}")
            page.wait(f"{CONTRAST}('span[title$=bits]') > 4.5")  # once the colours have changed over
        page.type("whale " * 600)
        page.click("Show")
        page.wait('document.body.innerText.includes("the model takes 512")')  # what is wrong is said


@pytest.mark.slow
def test_person_classifies(classifier, tmp_path):
    with opened(classifier, tmp_path / "profile") as page:
        page.type("Call me Ishmael")
        page.click("Classify")
        text = page.wait('document.body.innerText.includes("land") && document.body.innerText')
        assert sum(map(int, re.findall(r"(\d+)%", text))) in (99, 100, 101)


@pytest.mark.slow  # needs gradio, which the long tests install
def test_answers_grow_and_end_where_nobody_reads_on(model, tokenizer):
    from hf_lm.serving.demo import stream
    from hf_lm.serving.engine import Engine

    engine, steps = Engine(model), []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    try:
        whole = list(stream(engine, tokenizer, [1, 2, 3], 20, 0.0, 1.0))
        assert len(whole) > 3 and all(later.startswith(text) for text, later in itertools.pairwise(whole))
        assert whole == list(stream(engine, tokenizer, [1, 2, 3], 20, 0.0, 1.0))
        answer = stream(engine, tokenizer, [1, 2, 3], 900, 1.0, 0.9)
        next(answer)
        answer.close()
        assert list(stream(engine, tokenizer, [1, 2, 3], 1, 0.0, 1.0))[-1] == whole[0]
    finally:
        hook.remove()
    assert len(steps) < 450
