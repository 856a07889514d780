"""
Model cards from artifacts: every number of a card is read from a file of the model folder, never typed in.

`metrics.json` (what training measured), `parity.json` (what an import compared), `config.json`, the header of the
weight files and the metadata of an earlier `README.md` are read; what none of them holds is said to be missing. The
words are in `card_template.<language>.md`.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id, yaml_dump

from ..configuration_hf_lm import HfLmConfig
from ..errors import InputError
from ..files import read_json, write_text
from ..hardware import assumed_watts
from ..records import read_metrics
from ..tasks import result_names, usage

NOT_MEASURED = {"en": "not measured", "zh": "未测量"}
NOT_RECORDED = {"en": "not recorded", "zh": "未记录"}

# Architecture suffix -> pipeline tag of the Hub.
PIPELINE_TAGS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "Model": "feature-extraction",
}
# Pipeline tag -> the Auto class and the lines that use it, in the card's example.
USAGE = {
    "text-generation": (
        "AutoModelForCausalLM",
        'inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)\n'
        "output = model.generate(**inputs, max_new_tokens=40)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))",
    ),
    "chat": (
        "AutoModelForCausalLM",
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "inputs = tokenizer.apply_chat_template("
        'messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "output = model.generate(**inputs, max_new_tokens=40)\n"
        'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ),
    "text-classification": (
        "AutoModelForSequenceClassification",
        'inputs = tokenizer("A text to classify.", return_tensors="pt", return_token_type_ids=False)\n'
        "print(model.config.id2label[int(model(**inputs).logits.argmax())])",
    ),
    "token-classification": (
        "AutoModelForTokenClassification",
        'inputs = tokenizer("A text to label.", return_tensors="pt", return_token_type_ids=False)\n'
        "print([model.config.id2label[int(label)] for label in model(**inputs).logits[0].argmax(-1)])",
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        'inputs = tokenizer("Who called? Anna called.", return_tensors="pt", return_token_type_ids=False)\n'
        "output = model(**inputs)\n"
        "start, end = int(output.start_logits.argmax()), int(output.end_logits.argmax())\n"
        'print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))',
    ),
    "feature-extraction": (
        "AutoModel",
        'inputs = tokenizer("A text.", return_tensors="pt", return_token_type_ids=False)\n'
        "print(model(**inputs).last_hidden_state.shape)  # (batch, sequence, hidden)",
    ),
}
WIDEST = 20  # confusion matrix that is shown, in labels; metrics.json holds any


class Facts(dict):
    """Values for the template; one that no artifact holds reads as `missing`."""

    def __init__(self, values: dict, missing: str):
        super().__init__({key: shown(value) for key, value in values.items() if value is not None})
        self.missing = missing

    def __missing__(self, key: str) -> str:
        return self.missing


def shown(value) -> object:
    """A value as it reads in a Markdown table: numbers with four significant digits, text that cannot break the row."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()).replace("|", "\\|")
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def count_parameters(folder: Path) -> dict[str, int]:
    """The number of parameters (of tied ones only one is stored), from the headers of the weight files."""
    from safetensors import safe_open

    parameters = embedding = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                count = math.prod(file.get_slice(name).get_shape())
                parameters += count
                embedding += count if "embed_tokens" in name or "lm_head" in name else 0
    return {"parameters": parameters, "embedding_parameters": embedding} if parameters else {}


def compute_facts(metrics: dict, parameters: int | None) -> dict:
    """Operations, energy and memory of the training: counted where an artifact says so, otherwise called an estimate."""
    facts = {}
    tokens, seconds = metrics.get("train_tokens"), metrics.get("train_seconds")
    if metrics.get("train_flops"):
        facts = {"flops": metrics["train_flops"], "flops_source": "counted"}
    elif metrics.get("total_flos"):
        facts = {"flops": metrics["total_flos"], "flops_source": "trainer"}
    elif parameters and tokens:
        facts = {"flops": 6.0 * parameters * tokens, "flops_source": "formula"}
    if facts:
        facts["flops"] = f"{facts['flops']:.3g}"
    watts = assumed_watts(metrics.get("hardware"))
    if metrics.get("energy_joules"):
        facts["watt_hours"] = metrics["energy_joules"] / 3600
    elif watts and seconds:
        facts |= {"watts": watts, "watt_hours": watts * seconds / 3600}
    peak = metrics.get("peak_device_memory_bytes") or metrics.get("peak_memory_bytes")
    return facts | ({"peak_memory_mib": peak / 2**20} if peak else {})


def is_hub_id(name: str | None) -> bool:
    """`owner/name`, as opposed to a file, a folder or nothing."""
    if not name or "/" not in name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def base_model_of(metrics: dict, parity: dict) -> dict:
    """`{id, revision, code_revision}` of the checkpoint that this model started from, `{}` if it started from none."""
    base = metrics.get("base_model") or {"id": parity.get("source"), "revision": parity.get("revision")}
    base = {"id": base} if isinstance(base, str) else dict(base)
    if base.get("id") and not is_hub_id(base["id"]):
        base["id"] = Path(base["id"]).name  # where it lay on somebody's disk is nobody's business
    return base if base.get("id") else {}


def results_of(metrics: dict, task: str | None = None) -> list[dict]:
    """
    The measured results: `{key, name, value, interval}`; `interval` is `[low, high]` where one was measured.

    `chrf/en-de` is the chrF of a part of what was measured, en-de.

    Args:
        metrics: of a run, or of a baseline.
        task: whose results they are; default: the run's.

    Raises:
        InputError: a result is not a finite number.
    """
    rows = []
    for key, name in result_names(task or metrics.get("task")).items():
        for part in ("", *(other.removeprefix(key) for other in metrics if other.startswith(f"{key}/"))):
            value = metrics.get(key + part, metrics.get(f"eval_{key}{part}"))
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"metrics.json: {key}{part} must be a finite number, got {value!r}.")
            interval = metrics.get(f"{key}_interval{part}")
            rows.append({"key": key, "name": name + part.replace("/", " "), "value": value, "interval": interval})
    return rows


def class_rows(metrics: dict) -> tuple[list[list], list[list]]:
    """
    Of a classifier: a row for each label with its precision, recall, F1 and support, and the confusion matrix, a row for
    each true label with the number of predictions of each label. The matrix is empty for more than `WIDEST` labels.
    """
    per_class = metrics.get("per_class") or {}
    scores = [
        [name, *(row[key] for key in ("precision", "recall", "f1", "support"))] for name, row in per_class.items()
    ]
    matrix = metrics.get("confusion_matrix") or ()
    confusion = [[name, *counts] for name, counts in zip(per_class, matrix, strict=False)]
    return scores, confusion if len(confusion) <= WIDEST else []


def card_metadata(folder: Path) -> dict:
    """The metadata of the folder's present card: what a person stated there is kept. `{}` if there is none."""
    try:
        return ModelCard((folder / "README.md").read_text(encoding="utf-8")).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def pipeline_tag_of(config: dict) -> str | None:
    """The Hub's name of what a model is for, from its class; None if that is not known."""
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return next((tag for end, tag in PIPELINE_TAGS.items() if architecture.endswith(end)), None)


def build_metadata(artifacts: dict, name: str, license: str | None, text_language: str | None) -> ModelCardData:
    """The YAML part of a card. Licence, language, tags, data and base model of an earlier card are kept."""
    metrics, data, base, earlier = (artifacts[key] for key in ("metrics", "data", "base", "earlier"))
    evaluated_on, pipeline_tag = artifacts["evaluated_on"], pipeline_tag_of(artifacts["config"])
    results = [
        EvalResult(
            task_type=pipeline_tag or "text-generation",
            dataset_type=evaluated_on,
            dataset_name=evaluated_on,
            dataset_split=metrics.get("split", "validation"),
            metric_type=row["key"],
            metric_name=row["name"],
            metric_value=row["value"],
            metric_args={"interval": row["interval"]} if row["interval"] else None,
        )
        for row in artifacts["results"]
    ]
    revisions = {"git_revision": metrics.get("git_revision")}
    revisions |= {f"base_model_{key}": base.get(key) for key in ("revision", "code_revision")}
    revisions = {key: value for key, value in revisions.items() if value}
    return ModelCardData(
        language=text_language or metrics.get("language") or data.get("language") or earlier.get("language"),
        license=license or metrics.get("license") or earlier.get("license"),
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=sorted({*(earlier.get("tags") or ()), str(artifacts["config"].get("model_type"))}),
        datasets=[data["dataset_name"]] if is_hub_id(data.get("dataset_name")) else earlier.get("datasets"),
        base_model=base["id"] if is_hub_id(base.get("id")) else earlier.get("base_model"),
        model_name=name.split("/")[-1],
        eval_results=results or None,
        **({"revisions": revisions} if revisions else {}),
    )


def read_recipe(path: Path) -> str | None:
    """The recipe of the run as YAML, without the token it may hold."""
    if not path.exists():
        return None
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return yaml_dump({key: value for key, value in recipe.items() if key != "hub_token"}).strip() or None


def read_artifacts(folder: Path) -> dict:
    """
    All that a card is made from.

    Raises:
        InputError: no model folder, or a file in it that cannot be read.
    """
    config, adapter = (read_json(folder / f"{name}.json", strict=True) for name in ("config", "adapter_config"))
    if adapter and not config:  # an adapter is described by its base model
        base = Path(adapter.get("base_model_name_or_path") or "")
        config = read_json(base / "config.json", strict=True) or {"architectures": ["ForCausalLM"]}
        if adapter.get("task_type") == "SEQ_CLS":  # its head is beside the adapter, the base model may have another
            config["architectures"] = ["ForSequenceClassification"]
    if not config:
        raise InputError(f"{folder}: not a model folder, it has no config.json.")
    if config.get("model_type") == HfLmConfig.model_type:  # the file leaves defaults out
        config = HfLmConfig.from_dict(config).to_dict()
    metrics, parity = read_metrics(folder), read_json(folder / "parity.json", strict=True)
    base = base_model_of(metrics, parity)
    data = {
        key: Path(value).name if value and key.endswith("_file") else value
        for key, value in (metrics.get("data") or {}).items()
    }
    data_name = data.get("dataset_name") or data.get("train_file")
    return {
        "config": config,
        "metrics": metrics,
        "parity": parity | ({"source": base["id"]} if parity else {}),
        "data": data,
        "data_name": data_name,
        "evaluated_on": str(data.get("validation_file") or data_name or "text"),
        "base": base,
        "results": results_of(metrics),
        "earlier": card_metadata(folder),
        "counts": count_parameters(folder),
        "recipe": read_recipe(folder / "recipe.yaml"),
    }


def build_card(
    model_dir: str | os.PathLike,
    language: str = "en",
    name: str | None = None,
    license: str | None = None,
    text_language: str | None = None,
) -> ModelCard:
    """
    The card of a model folder, built from the artifacts in it.

    Args:
        model_dir: folder with `config.json` and what there is of weights, `metrics.json`, `parity.json`,
            `recipe.yaml`, `loss_curve.png`.
        language: of the card's words, `"en"` or `"zh"`.
        name: of the model, `owner/name` if it will be on the Hub; default: `model_name` of `metrics.json`, or the
            folder's name.
        license, text_language: of the weights and of the text they were trained on, as the Hub writes them
            (`"apache-2.0"`, `"en"`); default: what `metrics.json` or an existing card states.

    Raises:
        InputError: no model folder, an artifact that cannot be read, an unknown language.
    """
    folder = Path(model_dir)
    if language not in NOT_MEASURED:
        raise InputError(f"language must be one of {', '.join(NOT_MEASURED)}, got {language!r}.")
    artifacts = read_artifacts(folder)
    metrics, counts = artifacts["metrics"], artifacts["counts"]
    name = name or metrics.get("model_name") or folder.resolve().name
    metadata = build_metadata(artifacts, name, license, text_language)
    parameters = counts.get("parameters", metrics.get("parameters"))
    chat = metadata.pipeline_tag == "text-generation" and (folder / "chat_template.jinja").exists()
    pipeline = "chat" if chat else metadata.pipeline_tag or "feature-extraction"
    auto_class, lines = USAGE[pipeline]
    if not chat:
        lines = usage(metrics.get("task"), metrics) or lines
    labels = (
        metrics.get("labels") if (folder / "adapter_config.json").exists() else None
    )  # the base model's are others
    head = f", id2label={dict(enumerate(labels))}" if labels and pipeline == "text-classification" else ""
    remote_code = "auto_map" in artifacts["config"]
    # The tokenizer is none of ours, but transformers asks before it looks at the config.
    trust = ", trust_remote_code=True" if remote_code else ""
    baselines = [
        row | {"name": f"{row['name']}: {other['name']}"}
        for other in metrics.get("baselines") or ()
        for row in results_of(other, metrics.get("task"))
    ]
    per_class, confusion = ([[*map(shown, row)] for row in rows] for rows in class_rows(metrics))
    measured = {**metrics, **counts, "parameters": parameters, **compute_facts(metrics, parameters)}
    return ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name(f"card_template.{language}.md")),
        name=name,
        usage=f"from transformers import {auto_class}, AutoTokenizer\n\n"
        f"model_id = {json.dumps(name)}  # or the path of this folder\n"
        f"tokenizer = AutoTokenizer.from_pretrained(model_id{trust})\n"
        f"model = {auto_class}.from_pretrained(model_id{trust}{head})\n{lines}",
        remote_code=remote_code,
        has_chat_template=chat,
        has_loss_curve=(folder / "loss_curve.png").exists(),
        recipe=artifacts["recipe"],
        m=Facts(measured, NOT_MEASURED[language]),
        r=Facts(measured, NOT_RECORDED[language]),
        c=Facts(artifacts["config"], NOT_RECORDED[language]),
        d=Facts(artifacts["data"], NOT_RECORDED[language]),
        b=Facts(artifacts["base"], NOT_RECORDED[language]),
        parity=Facts(artifacts["parity"], NOT_RECORDED[language]),
        data_name=shown(artifacts["data_name"]) or NOT_RECORDED[language],
        evaluated_on=artifacts["evaluated_on"],
        results=[
            row | {"value": shown(row["value"]), "interval": " – ".join(map(shown, row["interval"] or ()))}
            for row in artifacts["results"] + baselines
        ],
        per_class=per_class,
        confusion=confusion,
        text_language=", ".join(
            [metadata.language] if isinstance(metadata.language, str) else metadata.language or ()
        ),
        citation=f"@misc{{{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')},\n"
        f"  title = {{{name}}},\n  howpublished = {{trained with hf\\_lm"
        + (f" at revision {metrics['git_revision']}" if metrics.get("git_revision") else "")
        + "}\n}",
    )


def write_card(
    model_dir: str | os.PathLike, language: str = "en", output: str | os.PathLike | None = None, **stated
) -> Path:
    """
    Write the card of a model folder.

    Args:
        model_dir, language, stated: see `build_card`.
        output: a file (default: `README.md` in the model folder; `README.zh.md` for Chinese); or an existing folder of
            cards, which receives `<model>/README.md` and the loss curve.

    Returns:
        The path of the card.

    Raises:
        InputError: see `build_card`.
    """
    card = build_card(model_dir, language, **stated)
    file_name = "README.md" if language == "en" else f"README.{language}.md"
    path = Path(output) if output else Path(model_dir) / file_name
    if path.is_dir():
        path = path / card.data.model_name / file_name
        path.parent.mkdir(exist_ok=True)
        picture = Path(model_dir) / "loss_curve.png"
        if picture.exists():
            shutil.copyfile(picture, path.with_name(picture.name))
    write_text(path, str(card))
    return path


def missing_from_card(model_dir: str | os.PathLike) -> list[str]:
    """What the folder's `README.md` lacks: metadata, example code, or the results that were measured since."""
    folder = Path(model_dir)
    metadata = card_metadata(folder)
    missing = [f"no {key}" for key in ("license", "language", "library_name", "pipeline_tag") if not metadata.get(key)]
    text = (folder / "README.md").read_text(encoding="utf-8") if metadata else ""
    if metadata and "```python" not in text:
        missing.append("no example of its use")
    stated = {
        (metric["type"], metric["value"])
        for model in metadata.get("model-index") or ()
        for result in model["results"]
        for metric in result["metrics"]
    }
    for row in results_of(read_metrics(folder)):
        if (row["key"], row["value"]) not in stated:
            missing.append(f"{row['key']} is not what metrics.json holds ({row['value']})")
    return [f"{gap}; write it with hf-lm card (--license, --text-language)" for gap in missing]
