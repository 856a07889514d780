"""The page that a run leaves: all of the run is on it, it stands alone, and it works in a real browser."""

import json
import re

import pytest
import yaml
from helpers.browser import CONTRAST, WIDTHS, found_on
from helpers.recipes import write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_lm.cli import main
from hf_lm.reports.report import write_report

PROMPT = "</script><b>Call me & </b>"
SCRIPT = """
const slider = document.getElementById("step"), values = () => document.querySelector("figcaption").textContent;
slider.focus(); found.focused = document.activeElement === slider;
found.charts = [...document.querySelectorAll("figure h3")].map(title => title.textContent);
found.drawn = [...document.querySelectorAll("figure svg")].map(svg => svg.querySelectorAll("polyline").length);
found.labels = [...document.querySelectorAll("figure svg")].map(svg => svg.ariaLabel);
found.last = values(); found.chosen = document.getElementById("chosen").textContent;
slider.value = 0; slider.dispatchEvent(new Event("input"));
found.first = values();
const svg = document.querySelector("figure svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointerdown", {clientX: box.right - 10, clientY: box.top + 50, bubbles: true}));
found.touched = document.getElementById("chosen").textContent;
found.samples = [...document.querySelectorAll("blockquote")].map(quote => quote.textContent);
found.tables = [...document.querySelectorAll("#tables h2")].map(title => title.textContent);
found.stops = document.querySelectorAll("input, summary, [tabindex='0']").length;
found.unnamed = [...document.querySelectorAll("input, [role=region], svg")].filter(node => !node.ariaLabel && !node.labels?.length).length;
found.recipe = document.getElementById("recipe").textContent;
found.contrast = CONTRAST("p, td, th, figcaption *, summary");
found.right_aligned = [...document.querySelectorAll("td.number")].map(cell => cell.textContent);
""".replace("CONTRAST", CONTRAST)


@pytest.fixture(scope="module")
def run(tmp_path_factory, moby_dick):
    folder = tmp_path_factory.mktemp("report")
    (folder / "book.txt").write_text(moby_dick[:60_000], encoding="utf-8")
    prompts = ["", PROMPT, " ".join(moby_dick[3000:3100].split())]  # the last from the training text
    path = write_recipe(
        folder, logging_steps=2, sample_prompts=prompts, sample_tokens=24, forecast=True, validation_split_percentage=5
    )
    assert main(["train", path, "--log_histograms", "true", "--log_graph", "true"]) == 0
    return folder / "run"


def data_of(page) -> dict:
    html = page.read_text(encoding="utf-8")
    assert "__DATA__" not in html and html.count("</script>") == 2
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|https?://(?!www\.w3\.org/2000/svg)", html)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def table(data: dict, title: str) -> dict:
    return {row[0]: row[1:] for row in next(table["rows"] for table in data["tables"] if table["title"] == title)}


def test_report_holds_what_the_run_measured(run):
    data, metrics = data_of(run / "report.html"), json.loads((run / "metrics.json").read_text())
    curves = {chart["title"]: chart["series"] for chart in data["charts"]}
    assert [len(line["points"]) for line in curves["Loss, nats per token"]] == [6, 2]
    assert curves["Bits per byte, held out"][0]["points"][-1] == [12, pytest.approx(metrics["bits_per_byte"])]
    assert all(rate > 0 for _, rate in curves["Tokens per second"][0]["points"])
    assert {"Learning rate", "Gradient norm"} <= set(curves)
    assert [(sample["step"], sample["prompt"]) for sample in data["samples"]] == [
        (step, prompt) for step in (6, 12) for prompt in yaml.safe_load(data["recipe"])["sample_prompts"]
    ]
    trained = table(data, "Cost")["until the model was trained"]
    assert trained[1] == f"{metrics['actual']['trained_seconds']:,.1f} s"
    assert trained[0] == f"{metrics['predicted']['trained_seconds']:,.1f} s" and trained[2].endswith(" %")
    assert table(data, "Results")["bits per byte"][0] == f"{metrics['bits_per_byte']:.4g}"
    assert list(table(data, "Evaluations on the way")) == ["6", "12"]
    assert table(data, "Data")["sha256"] == [metrics["data"]["sha256"]]
    assert yaml.safe_load(data["recipe"])["max_steps"] == 12


def test_quality_is_that_of_samples_and_of_held_out_text(run, moby_dick):
    quality = json.loads((run / "metrics.json").read_text())["quality"]
    assert 0 <= quality["ece"] <= 1 and quality["tokens"] > 100 and quality["samples"] == 12
    assert 54_000 < quality["searched_characters"] <= 60_000
    # a prompt that is given from the training text is not what the model has learned by heart
    assert len(quality["overlap"]) < 50
    assert quality["overlap"] in moby_dick[:60_000] and len(quality["overlap"]) == quality["overlap_characters"] > 0
    assert 0 < quality["distinct_1"] <= quality["distinct_2"] <= 1


def test_tensorboard_has_the_same_scalars_and_what_was_asked_for(run):
    (folder,) = (run / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    tags = events.Tags()
    wanted = {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second", "eval/bits_per_byte"}
    assert wanted <= set(tags["scalars"]) and tags["graph"]
    assert "model.embed_tokens.weight" in tags["histograms"]
    for number, line in enumerate((run / "samples.jsonl").read_text().splitlines()[3:6]):
        event = next(event for event in events.Tensors(f"sample/{number}/text_summary") if event.step == 12)
        assert event.tensor_proto.string_val[0].decode() == json.loads(line)["text"]


@pytest.mark.slow  # needs peft, which the long tests install
def test_tensorboard_has_the_graph_below_an_adapter(run, recipe, tmp_path):
    keys = {"model_name_or_path": str(run), "use_peft": True, "config_overrides": None, "max_steps": 2}
    path = recipe(**keys, eval_strategy="no", sample_prompts=None)
    assert main(["train", path, "--log_graph", "true"]) == 0
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    assert EventAccumulator(str(folder)).Reload().Tags()["graph"]


def test_report_of_a_run_without_evaluation_and_samples(recipe, tmp_path):
    keys = {"eval_strategy": "no", "validation_split_percentage": 0, "sample_prompts": None}
    assert main(["train", recipe(**keys)]) == 0
    data = data_of(tmp_path / "run" / "report.html")
    assert data["samples"] == [] and [len(chart["series"]) for chart in data["charts"]] == [1] * 4
    assert not {"Evaluations on the way", "Results", "Quality"} & {table["title"] for table in data["tables"]}
    assert table(data, "Cost")["until the model was trained"][0] is None


def test_report_leaves_out_what_is_no_number(tmp_path):
    rows = [{"step": 1, "loss": float("nan"), "grad_norm": float("inf")}, {"step": 2, "loss": 3.0, "grad_norm": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    data = data_of(write_report(tmp_path))
    assert [line["points"] for chart in data["charts"] for line in chart["series"]] == [[[2, 3.0]], [[2, 1.0]]]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), WIDTHS)
def test_report_works_in_a_browser(run, tmp_path, width, dark):
    found = found_on(run / "report.html", SCRIPT, tmp_path, width, dark)
    assert found["unnamed"] == 0 and found["focused"] and found["contrast"] >= 4.5
    assert len(found["charts"]) == 5 and found["drawn"] == [2, 1, 1, 1, 1] and "training from" in found["labels"][0]
    assert found["first"].endswith("held out –") and "training" in found["last"] and found["first"] != found["last"]
    assert found["chosen"] == found["touched"] == "12"
    assert len(found["samples"]) == 3 and found["samples"][1].startswith(PROMPT)
    assert {"Results", "Evaluations on the way", "Quality", "Cost", "Data", "Run", "Model"} == set(found["tables"])
    assert "max_steps: 12" in found["recipe"] and found["stops"] >= 9
    assert all(cell.count(".") < 2 for cell in found["right_aligned"])  # numbers, not versions
