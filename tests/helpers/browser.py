"""A page opened in a real headless browser."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
WIDTHS = [(360, False), (1200, True)]  # of a small phone, and of a desk; whether it is dark

# The least ratio between a text and its ground, a see-through colour on the page (WCAG 2, 1.4.3).
CONTRAST = """(selector => {
    const colour = (node, name) => getComputedStyle(node)[name].match(/[\\d.]+/g).map(Number);
    const light = rgb => rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
    const paper = colour(document.body, "backgroundColor");
    return Math.min(...[...document.querySelectorAll(selector)].map(node => {
        const [r, g, b, a = 1] = colour(node, "backgroundColor");
        const ground = light([r, g, b].map((v, i) => v * a + paper[i] * (1 - a)));
        const text = light(colour(node, "color").slice(0, 3));
        return Math.max(text, ground) / Math.min(text, ground);
    }));
})"""
# Put around what a test does on a page; `found` is what it reads.
DONE = """<script>{
document.documentElement.style.width = "%dpx";  // a window may be no narrower than 500
dispatchEvent(new Event("resize"));
const found = {}, wide = [...document.querySelectorAll("body, body *")].filter(node => !node.parentElement.closest(".scroll, svg"));
found.right = Math.max(...wide.map(node => node.getBoundingClientRect().right));
found.paper = getComputedStyle(document.body).backgroundColor;
%s
found.loaded = performance.getEntriesByType("resource").length;
found.errors = window.problems;
const report = document.createElement("pre");
report.id = "found"; report.textContent = JSON.stringify(found);
document.body.append(report);
}</script></html>"""


def browser() -> str:
    name = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
    assert name, "no browser; on Debian: apt-get install chromium"
    return name


def visit(page: Path, profile: Path, dark: bool, *options: str) -> str:
    """What the browser prints."""
    scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
    command = [browser(), *FLAGS, "--hide-scrollbars", scheme, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def found_on(page: Path, script: str, folder: Path, width: int, dark: bool) -> dict:
    """
    What a script finds on a page of that width: it stands alone, without an error, as wide as the window at most, in the
    colours that are asked for. A picture of it is left in the folder.
    """
    watch = "<script>window.problems = []; window.onerror = text => window.problems.push(text);</script>"
    html = page.read_text(encoding="utf-8").replace("<main>", watch + "<main>")
    copy, shot = folder / "copy.html", folder / "page.png"
    copy.write_text(html.replace("</html>", DONE % (width, script)), encoding="utf-8")
    dom = visit(copy, folder / "profile", dark, "--dump-dom", f"--window-size={width},900")
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["errors"] == [] and found["loaded"] == 0
    assert 0.9 * min(width, 1000) < found["right"] <= width
    assert found["paper"] == ("rgb(21, 24, 28)" if dark else "rgb(253, 253, 251)")
    visit(page, folder / "profile", dark, f"--screenshot={shot}", f"--window-size={width},3000")
    assert shot.stat().st_size > 20_000
    return found
