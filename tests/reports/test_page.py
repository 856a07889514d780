"""The page of `inspect` in a real browser: complete, alone, usable by keyboard and on a phone, light and dark."""

import json
import re

import pytest
import torch
from helpers.browser import CONTRAST, WIDTHS, found_on

from hf_lm import HfLmConfig, HfLmForCausalLM
from hf_lm.cli import main
from hf_lm.reports.page import write_page
from hf_lm.tokenization import train_tokenizer

TEXT = 'The <b>whale</b> & the \N{WHALE} "captain" </script> 鲸'
# What a person does, done by events; the findings are left in the document.
SCRIPT = """
const press = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const pressed = () => [...document.querySelectorAll("#surprise button")].findIndex(chip => chip.ariaPressed === "true");
const toolbar = document.getElementById("surprise");
found.chips = [...toolbar.children].map(chip => chip.textContent);
found.first = pressed();
toolbar.querySelector("[tabindex='0']").focus();
press(document.activeElement, "ArrowLeft");
found.left = pressed(); found.focused = [...toolbar.children].indexOf(document.activeElement);
press(document.activeElement, "Home");
found.home = pressed(); found.start = document.getElementById("details").textContent;
press(document.activeElement, "ArrowRight");
found.details = document.getElementById("details").textContent;
document.querySelectorAll("#ablation button")[1].click();
found.picked = [document.getElementById("layer").value, document.getElementById("head").value];
found.label = document.querySelector("#map svg").ariaLabel;
document.getElementById("layer").value = 1;
document.getElementById("layer").dispatchEvent(new Event("change"));
found.changed = document.querySelector("#map svg").ariaLabel;
found.rects = document.querySelectorAll("#map rect").length;
found.lens = document.querySelectorAll("#lens tbody tr").length;
found.bars = document.querySelectorAll("#attribution i").length;
found.unnamed = [...document.querySelectorAll("button, select")].filter(node => !node.textContent && !node.ariaLabel).length;
found.letters = Math.min(...[...document.querySelectorAll("#map text")].map(label => label.getBoundingClientRect().height));
toolbar.children[0].style.backgroundColor = tint("down", 1); toolbar.children[1].style.backgroundColor = tint("up", 1);
found.contrast = CONTRAST("button, td, p, thead th");
""".replace("CONTRAST", CONTRAST)


@pytest.fixture(scope="module")
def page(tmp_path_factory, moby_dick):
    folder = tmp_path_factory.mktemp("page")
    tokenizer = train_tokenizer([moby_dick[:30_000]], 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "zero_init_residual": False}
    HfLmForCausalLM(HfLmConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert main(["inspect", str(folder), "--text", TEXT, "--html", str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_page_is_whole_and_asks_for_nothing(page):
    html = page.read_text(encoding="utf-8")
    assert "__DATA__" not in html and html.count("</script>") == 2
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", html)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["text"] == TEXT and data["attention"]["shape"][:2] == [2, 2]


def test_page_replaces_an_older_one_only_when_it_is_complete(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(TypeError, match="object cannot be written"):
        write_page("inspect.html", {"model": object()}, path)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_inspect_refuses_what_it_cannot_show(page, tmp_path, capsys):
    words = ["inspect", str(page.parent), "--html", str(tmp_path / "new.html"), "--text"]
    assert main([*words, ""]) == 2 and "--text" in capsys.readouterr().err
    assert main([*words, "whale", "--target", "50"]) == 2 and "--target" in capsys.readouterr().err
    assert main([*words[:2], "--html", str(tmp_path / "no" / "new.html"), "--text", "whale"]) == 2
    assert "--html" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), WIDTHS)
def test_page_works_in_a_browser(page, tmp_path, width, dark):
    found = found_on(page, SCRIPT, tmp_path, width, dark)
    last = len(found["chips"]) - 1
    assert found["unnamed"] == 0 and found["contrast"] >= 4.5 and found["letters"] >= 9
    assert found["chips"][0] == "<|bos|>" and "<0xE9>" in found["chips"]
    assert (found["first"], found["left"], found["focused"], found["home"]) == (last, last - 1, last - 1, 0)
    assert "given start" in found["start"] and "bits" in found["details"] and "Expected here" in found["details"]
    assert found["picked"] == ["0", "1"] and found["label"].endswith("layer 1, head 2")
    assert found["changed"].endswith("layer 2, head 2") and found["rects"] > last
    assert found["lens"] == 3 and found["bars"] == last
