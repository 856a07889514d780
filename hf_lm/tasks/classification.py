"""Labels for texts: by a classification head, or by how likely a language model finds the words that name them."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import DataCollatorWithPadding
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging
from transformers.utils.import_utils import is_sklearn_available

from ..data.documents import load_rows, task_hint, with_text
from ..data.examples import Example, build_examples
from ..errors import InputError
from ..evaluation.metrics import HfLmClassification
from ..evaluation.metrics.classification import SCORES, class_scores, count_confusions
from ..modeling_hf_lm import HfLmForCausalLM, HfLmForSequenceClassification
from ..training.loaders import replaced
from ..training.metrics import WholeSet
from ..training.trainer import HfLmTrainer
from .base import PreparedData, Task

logger = logging.get_logger(__name__)


def as_score(metrics: dict, prefix: str = "") -> dict:
    """What `HfLmClassification` gives, as metrics.json has it: intervals as pairs."""
    score = {name: metrics[prefix + name] for name in (*SCORES, "ece")}
    for name in SCORES:
        score[f"{name}_interval"] = [metrics[f"{prefix}{name}_{end}"] for end in ("low", "high")]
    return score


def tfidf_baseline(rows: dict[str, Dataset], split: str, labels: int, balanced: bool) -> dict:
    """What counting words and pairs of words achieves: TF-IDF and logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    regression = LogisticRegression(C=10, max_iter=1000, class_weight="balanced" if balanced else None)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), regression)
    model.fit(rows["train"]["text"], rows["train"]["label"])
    probabilities = np.zeros((len(rows[split]), labels))
    probabilities[:, model.classes_] = model.predict_proba(rows[split]["text"])
    score = HfLmClassification().compute(predictions=probabilities.tolist(), references=rows[split]["label"])
    return {"name": "TF-IDF + logistic regression", **as_score(score)}


def spell(value) -> str:
    """A label as it is written; "" for none."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def hold_out_by_label(rows: Dataset, percentage: float, column: str) -> dict[str, Dataset]:
    """Split off the last `percentage` per cent of the rows of each label; of a label's rows one at least is learned."""
    labels = np.array([spell(value) for value in rows[column]])
    count = math.ceil(len(rows) * percentage / 100)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    shares = np.array([len(group) * percentage / 100 for group in groups])
    counts = np.floor(shares).astype(int)
    for number in np.argsort(counts - shares, kind="stable"):  # the largest remainders make up the sum
        if counts.sum() < count and counts[number] < len(groups[number]) - 1:
            counts[number] += 1
    held_out = np.zeros(len(rows), dtype=bool)
    for group, size in zip(groups, counts, strict=True):
        held_out[group[len(group) - size :]] = True
    if not held_out.any():
        raise InputError(
            f"validation_split_percentage: {percentage} per cent of {len(rows)} rows leaves none to score."
        )
    return {"train": rows.select(np.flatnonzero(~held_out)), "validation": rows.select(np.flatnonzero(held_out))}


def names_of(rows: Dataset) -> list[str]:
    """The labels there are, in the order of their numbers."""
    return rows.features["label"].names


class Classification(Task):
    """
    One of the labels for each text. Rows become `text` and `label`, a `ClassLabel`.

    Of what is too long the end of the text goes; the template around it, the label's words and special tokens stay.
    """

    reported = ("loss", *(name + part for name in SCORES for part in ("", "_low", "_high")), "ece")
    result_names = {
        "accuracy": "accuracy",
        "f1": "F1",
        "macro_precision": "macro precision",
        "macro_recall": "macro recall",
        "macro_f1": "macro F1",
        "ece": "expected calibration error",
    }
    charts = Task.charts | {"Accuracy and F1, held out": {"accuracy": "eval_accuracy", "macro F1": "eval_macro_f1"}}

    @property
    def template(self) -> str:
        """What the model reads: `{text}`, and at the end `{label}` where words are learned."""
        return "{text}"

    def words(self, names: list[str]) -> tuple[str, ...]:
        """The words for `{label}`: one for each of `names`, or an empty one where there is no `{label}`."""
        return ("",)

    def load(self) -> dict[str, Dataset]:
        arguments, column = self.data_arguments, self.data_arguments.label_column_name
        if arguments.streaming:
            raise InputError(f"streaming: does not go with the task {arguments.task}.")

        def keep(rows: Dataset, where: str) -> Dataset:
            if column not in rows.column_names:
                names = ", ".join(rows.column_names)
                hint = task_hint(set(rows.column_names) - {"text"})
                raise InputError(f"label_column_name: {where} has no column {column}; it has {names}.{hint}")
            rows = with_text(rows, arguments.text_column_name, where, beside=[column])
            some = rows.filter(str.strip, input_columns="text")
            if len(some) < len(rows):
                logger.warning(f"{where}: {len(rows) - len(some)} texts are nothing but white space and left out.")
            rows = some
            if len(rows) < 2:
                raise InputError(f"{where}: holds {len(rows)} examples; at least two are needed.")
            return rows.shuffle(self.training_arguments.seed)  # files are often sorted by their labels

        rows = load_rows(arguments, keep, partial(hold_out_by_label, column=column))
        names, numbers = self.name_labels(rows["train"], column)
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        for split, part in rows.items():
            texts, labels = part["text"], [spell(value) for value in part[column]]
            for text, label in zip(texts, labels, strict=True):
                if label not in numbers:
                    reason = f"has the label {label!r} ({text[:40]!r}), not among {', '.join(map(repr, numbers))}"
                    reason = reason if label else f"has a text without a label ({text[:40]!r})"
                    raise InputError(f"class_names: {split} {reason}.")
            found = {"text": texts, "label": [numbers[label] for label in labels]}
            rows[split] = Dataset.from_dict(found, features)
        return rows

    def name_labels(self, rows: Dataset, column: str) -> tuple[list[str], dict[str, int]]:
        """The names of the labels, those declared or all that occur; and the number of each as `spell` writes it."""
        feature, values = rows.features[column], rows[column]
        if odd := [value for value in values if not isinstance(value, str | int | None)]:
            raise InputError(
                f"label_column_name: column {column} holds {odd[0]!r:.60}; a label is text or a whole number."
            )
        found = {spell(value) for value in values} - {""}
        are_whole = all(re.fullmatch(r"0|-?[1-9]\d*", label) for label in found)
        declared = self.data_arguments.class_names or (feature.names if isinstance(feature, ClassLabel) else None)
        names = [str(name) for name in declared or sorted(found, key=int if are_whole else str)]
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(f"class_names: two or more different labels are needed, got {', '.join(names)}.")
        spelled = names
        if any(isinstance(value, bool) for value in values):
            spelled = [name.lower() for name in names]  # True, where Python wrote it
        if isinstance(feature, ClassLabel) or (declared and are_whole and not found <= set(spelled)):
            spelled = map(str, range(len(names)))
        return names, {label: number for number, label in enumerate(spelled)}

    def texts(self, rows) -> Iterator[str]:
        words = self.words(names_of(rows))
        return (self.fill(row["text"], words[row["label"] % len(words)])[0] for row in rows)

    def complete_tokenizer(self, tokenizer) -> None:
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise InputError(
                    "tokenizer_name: the tokenizer has neither a pad nor an eos token to fill batches with."
                )
            tokenizer.pad_token = tokenizer.eos_token

    def config_fields(self, data: PreparedData) -> dict:
        names = dict(enumerate(names_of(data.rows["train"])))
        numbers = {name: number for number, name in names.items()}
        return {"id2label": names, "label2id": numbers, "pad_token_id": data.tokenizer.pad_token_id}

    def fill(self, text: str, word: str) -> tuple[str, int, int]:
        """The template with text and word; where the text starts and where the word does, in characters."""
        before, after = self.template.removesuffix("{label}").split("{text}")
        return before + text + after + word, len(before), len(before + text + after)

    def example(self, text: str, word: str, tokenizer) -> tuple[Example, int]:
        """Template, text and word, the word learned, and how many tokens at the text's end had to go."""
        whole, start, word_start = self.fill(text, word)
        encoding = tokenizer(whole, return_offsets_mapping=True, verbose=False)
        ids, offsets, size = encoding["input_ids"], encoding["offset_mapping"], self.data_arguments.block_size
        excess = max(len(ids) - size, 0)
        if excess:
            of_text = [n for n, (low, high) in enumerate(offsets) if high > start and low < start + len(text)]
            if excess >= len(of_text):
                raise InputError(f"block_size: {size} leaves no room for a text beside the template's tokens.")
            gone = slice(of_text[-1] + 1 - excess, of_text[-1] + 1)
            del ids[gone], offsets[gone]
        learned = [high > word_start for _, high in offsets]
        return Example(ids, learned, len((word or text).encode())), excess

    def order(self, rows: Dataset, split: str) -> list[int]:
        """Held-out rows by their length; training rows are shuffled, with `class_balance` rarer labels repeated."""
        texts, labels = rows["text"], np.array(rows["label"])
        if split != "train":
            return sorted(range(len(texts)), key=lambda number: len(texts[number]))  # like lengths share a batch
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        if self.data_arguments.class_balance == "oversample":
            groups = [np.resize(group, max(map(len, groups))) for group in groups]
        order = np.random.default_rng(self.training_arguments.seed).permutation(np.concatenate(groups))
        if len(order) > len(labels):
            logger.warning(f"{split}: rarer labels are repeated, {len(labels):,} examples become {len(order):,}.")
        return order.tolist()

    def examples(self, rows: Dataset, tokenizer, split: str) -> list[tuple[Example, int]]:
        """Examples and their labels: training rows with their own word, held-out rows with every word in turn."""
        policy, size, train = self.data_arguments.long_examples, self.data_arguments.block_size, split == "train"
        texts, labels, words = rows["text"], rows["label"], self.words(names_of(rows))
        drop, found, long = train and policy == "drop", [], set()  # what is held out is scored whole
        for number in self.order(rows, split):
            label = labels[number]
            for word in (words[label % len(words)],) if train else words:
                example, excess = self.example(texts[number], word, tokenizer)
                if excess:
                    long.add(number)
                if not (excess and drop):
                    found.append((example, label))
        if long:
            what = f"{split}: {len(long)} of {len(rows)} examples have more than block_size {size} tokens"
            if policy == "error" or not found:
                raise InputError(f"long_examples: {what}.")
            logger.warning(f"{what} and are {'left out' if drop else 'cut at the end of their text'}.")
        return found

    def encode_splits(self, data: PreparedData) -> dict[str, Dataset]:
        if self.data_arguments.baseline and not is_sklearn_available():
            logger.warning("baseline: scikit-learn is not installed, there will be none (pip install scikit-learn).")
        # Rows for testing too, so that what is wrong with them is said before the training.
        return {split: self.encode(rows, data.tokenizer, split) for split, rows in data.rows.items()}

    @abstractmethod
    def probabilities(self, predictions: np.ndarray, names: list[str]) -> np.ndarray:
        """`(examples, labels)` from the trainer's predictions for rows of tokens."""

    def references(self, data: PreparedData, split: str) -> list[int]:
        """The right labels of a held-out split, in the order of its rows of tokens."""
        rows = data.rows[split]
        labels = rows["label"]
        return [labels[number] for number in self.order(rows, split)]

    def metrics_of(self, data: PreparedData, split: str) -> Callable[[EvalPrediction], dict[str, float]]:
        names = names_of(data.rows["train"])
        references = self.references(data, split) if split in data.rows else []

        def compute(rows: EvalPrediction) -> dict[str, float]:
            predictions = self.probabilities(rows.predictions, names)
            right = predictions[np.arange(len(references)), references].clip(np.finfo(float).tiny)
            scores = HfLmClassification().compute(predictions=predictions.tolist(), references=references)
            return {"loss": float(-np.log(right).mean()), **scores}

        return compute

    def score(self, trainer: HfLmTrainer, data: PreparedData) -> dict:
        """
        Score the test split, or without one the validation split; `{}` if nothing is held out.

        `confusion_matrix` has a row for each true label and a column for each predicted one, in the order of the labels.
        """
        split = "test" if "test" in data.rows else "validation"
        if split not in data.rows:
            return {}
        names, rows = names_of(data.rows["train"]), data.encoded[split]
        with replaced(trainer, compute_metrics=WholeSet(self.metrics_of(data, split))):
            output = trainer.predict(rows, metric_key_prefix=split)
        found = self.probabilities(output.predictions, names).argmax(axis=1)
        confusion = count_confusions(np.array(self.references(data, split)), found, len(names))
        by_class = {name: values.tolist() for name, values in class_scores(confusion).items()}
        return {
            "split": split,
            "examples": len(data.rows[split]),
            **as_score(output.metrics, f"{split}_"),
            "per_class": {
                label: {name: values[number] for name, values in by_class.items()}
                for number, label in enumerate(names)
            },
            "confusion_matrix": confusion.tolist(),
        }

    def scores(self, trainer: HfLmTrainer, data: PreparedData, before: dict) -> dict:
        score, baselines, names = self.score(trainer, data), [before] if before else [], names_of(data.rows["train"])
        if score and self.data_arguments.baseline and is_sklearn_available():
            balanced = self.data_arguments.class_balance != "none"
            baselines.append(tfidf_baseline(data.rows, score["split"], len(names), balanced))
        return {**score, "labels": names, "baselines": baselines}

    def summary(self, metrics: dict) -> str:
        interval = "{accuracy_interval[0]:.3f} to {accuracy_interval[1]:.3f}"
        form = f"{{name}}: accuracy {{accuracy:.3f}} ({interval}), macro F1 {{macro_f1:.3f}}, ECE {{ece:.3f}}"
        scores = [{"name": metrics["split"], **metrics}, *metrics["baselines"]] if "accuracy" in metrics else []
        return "; ".join(form.format(**score) for score in scores)


class SequenceClassification(Classification):
    """A head on the last token's state, trained together with all that is below it."""

    auto_class = model_class = HfLmForSequenceClassification
    peft_task_type = "SEQ_CLS"  # the head is trained whole and saved beside the adapter

    def encode(self, rows: Dataset, tokenizer, split: str) -> Dataset:
        return Dataset.from_list(
            [
                {"input_ids": example.input_ids, "labels": label, "num_bytes": example.num_bytes}
                for example, label in self.examples(rows, tokenizer, split)
            ]
        )

    def collator(self, tokenizer):
        return DataCollatorWithPadding(tokenizer)

    def probabilities(self, predictions: np.ndarray, names: list[str]) -> np.ndarray:
        return torch.tensor(predictions).double().softmax(-1).numpy()

    def show(self, trainer: HfLmTrainer, row: dict, color: bool) -> str:
        label = trainer.model.config.id2label[row["labels"]]
        return f"{trainer.processing_class.decode(row['input_ids'])} -> {label}"


class LabelLikelihood(Classification):
    """
    No head: `label_words` in `prompt_template`, and only they are learned. A label's probability is that of its words
    (the sum over their tokens) against the other labels' (PET, arXiv:2001.07676), before any training too.
    """

    auto_class = model_class = HfLmForCausalLM
    row_likelihoods = True

    @property
    def template(self) -> str:
        return self.data_arguments.prompt_template

    def words(self, names: list[str]) -> tuple[str, ...]:
        """
        Raises:
            InputError: `label_words` are not one for each label.
        """
        words = self.data_arguments.label_words or names
        if len(words) != len(names) or len(set(words)) < len(words):
            raise InputError(f"label_words: one for each of {', '.join(names)}, all different; got {words}.")
        return tuple(words)

    def load(self) -> dict[str, Dataset]:
        rows, template = super().load(), self.template
        if template.count("{text}") != 1 or template.count("{label}") != 1 or not template.endswith("{label}"):
            raise InputError(f"prompt_template: must hold {{text}} once and end in {{label}}, got {template!r}.")
        self.words(names_of(rows["train"]))  # so that what is wrong with them is said first
        return rows

    def encode(self, rows: Dataset, tokenizer, split: str) -> Dataset:
        found, size = self.examples(rows, tokenizer, split), self.data_arguments.block_size
        packing = split == "train" and self.data_arguments.packing
        return build_examples((example for example, _ in found), lambda example: [example], size, packing, where=split)

    def probabilities(self, predictions: np.ndarray, names: list[str]) -> np.ndarray:
        return (-torch.tensor(predictions).double().view(-1, len(names))).softmax(-1).numpy()

    def scores_before(self, trainer: HfLmTrainer, data: PreparedData) -> dict:
        score = self.score(trainer, data) if self.model_arguments.model_name_or_path else {}
        return {"name": "before training", **score} if score else {}
