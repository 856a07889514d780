"""Labels for texts: by a classification head, or by how likely a language model finds the words that name them."""

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from transformers import DataCollatorWithPadding
from transformers.trainer_utils import EvalPrediction
from transformers.utils import logging
from transformers.utils.import_utils import is_sklearn_available

from ..data.documents import (
    column_names,
    column_values,
    load_rows,
    numbered,
    task_hint,
    text_lengths,
    with_text,
)
from ..data.examples import Example, Say, build_examples
from ..errors import InputError
from ..evaluation.metrics import HfLmClassification
from ..evaluation.metrics.classification import SCORES, class_scores, count_confusions
from ..modeling_hf_lm import HfLmForCausalLM, HfLmForSequenceClassification
from ..training.loaders import replaced
from ..training.metrics import WholeSet
from ..training.trainer import HfLmTrainer
from .base import PreparedData, Task

logger = logging.get_logger(__name__)
BATCH = 100  # texts tokenised at once
SEEN = 1000  # rows of a stream that show whether its labels are names or numbers


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
    names, labels = numbered(map(spell, column_values(rows, column)))
    count = math.ceil(len(rows) * percentage / 100)
    groups = [np.flatnonzero(labels == number) for number in range(len(names))]
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


def number_label(row: dict, column: str, numbers: dict[str, int], split: str) -> dict:
    """
    A row's text and the number of its label.

    Raises:
        InputError: the label has none.
    """
    label = spell(row[column])
    if label not in numbers:
        reason = f"has the label {label!r} ({row['text'][:40]!r}), not among {', '.join(map(repr, numbers))}"
        reason = reason if label else f"has a text without a label ({row['text'][:40]!r})"
        raise InputError(f"class_names: {split} {reason}.")
    return {"text": row["text"], "label": numbers[label]}


def fill(template: str, text: str, word: str) -> tuple[str, int, int]:
    """The template with text and word; where the text starts and where the word does, in characters."""
    before, after = template.removesuffix("{label}").split("{text}")
    return before + text + after + word, len(before), len(before + text + after)


def leave_out_end(offsets: list[tuple[int, int]], start: int, end: int, block_size: int) -> slice:
    """
    The tokens at a text's end that have to go for all to be no more than `block_size`.

    Args:
        offsets: of the tokens.
        start, end: of the text, in characters.

    Raises:
        InputError: the text has not as many.
    """
    excess = len(offsets) - block_size
    if excess <= 0:
        return slice(0)
    of_text = [number for number, (low, high) in enumerate(offsets) if high > start and low < end]
    if excess >= len(of_text):
        raise InputError(f"block_size: {block_size} leaves no room for a text beside the template's tokens.")
    return slice(of_text[-1] + 1 - excess, of_text[-1] + 1)


def encode_labelled(
    rows: Iterator[dict],
    tokenizer,
    say: Say,
    *,
    template: str,
    words: tuple[str, ...],
    block_size: int,
    policy: str,
    split: str,
    is_class: bool,
) -> Iterator[Example]:
    """
    Texts in the template: those of training with their own word, held-out ones with every word in turn. The word is
    learned. Of what is too long the text's end goes.

    Args:
        policy: for examples that are too long: `"cut"`, `"drop"` (in training only: the held-out set is scored whole)
            or `"error"`.
        is_class: the examples have the numbers of their labels.

    Raises:
        InputError: with `"error"` one is too long; or all are left out; or the template alone is too long.
    """
    total, long, drop = 0, 0, split == "train" and policy == "drop"
    while batch := list(islice(rows, BATCH)):
        asked = [(words[row["label"] % len(words)],) if split == "train" else words for row in batch]
        filled = [fill(template, row["text"], word) for row, some in zip(batch, asked, strict=True) for word in some]
        encoding = tokenizer([whole for whole, _, _ in filled], return_offsets_mapping=True, verbose=False)
        encoded = zip(filled, encoding["input_ids"], encoding["offset_mapping"], strict=True)
        for row, some in zip(batch, asked, strict=True):
            is_long = False
            for word in some:
                (_, start, word_start), ids, offsets = next(encoded)
                gone = leave_out_end(offsets, start, start + len(row["text"]), block_size)
                is_cut = gone.stop > 0
                del ids[gone], offsets[gone]
                is_long = is_long or is_cut
                if not (is_cut and drop):
                    learned, size = [high > word_start for _, high in offsets], len((word or row["text"]).encode())
                    yield Example(ids, learned, size, row["label"] if is_class else None)
            total, long = total + 1, long + is_long
    if long:
        what = f"{split}: {long} of {total} examples have more than block_size {block_size} tokens"
        if policy == "error" or (drop and long == total):
            raise InputError(f"long_examples: {what}.")
        say(f"{what} and are {'left out' if drop else 'cut at the end of their text'}.")


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

    def check(self) -> None:
        super().check()
        data = self.data_arguments
        if data.class_balance not in ("none", "oversample"):
            raise InputError(f"class_balance: must be none or oversample, got {data.class_balance!r}.")
        if data.streaming and data.class_balance != "none":
            raise InputError("class_balance: oversample needs the labels of all rows; a stream has none: use none.")
        if data.streaming and data.baseline:
            raise InputError("baseline: needs the texts of all rows; a stream has none: set it to false.")

    def load(self) -> dict[str, Dataset | IterableDataset]:
        arguments, column = self.data_arguments, self.data_arguments.label_column_name

        def keep(rows, where: str):
            names = column_names(rows)
            if column not in names:
                hint = task_hint(set(names) - {"text"})
                raise InputError(
                    f"label_column_name: {where} has no column {column}; it has {', '.join(names)}.{hint}"
                )
            rows = with_text(rows, arguments.text_column_name, where, beside=[column])
            some = rows.filter(str.strip, input_columns="text")
            if isinstance(rows, IterableDataset):
                return some
            if len(some) < len(rows):
                logger.warning(f"{where}: {len(rows) - len(some)} texts are nothing but white space and left out.")
            if len(some) < 2:
                raise InputError(f"{where}: holds {len(some)} examples; at least two are needed.")
            return some.shuffle(self.training_arguments.seed)  # files are often sorted by their labels

        rows = load_rows(arguments, keep, partial(hold_out_by_label, column=column))
        names, numbers = self.name_labels(rows["train"], column)
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        options = {"column": column, "numbers": numbers}
        return {
            split: part.map(
                partial(number_label, **options, split=split), remove_columns=["text", column], features=features
            )
            for split, part in rows.items()
        }

    def name_labels(self, rows: Dataset | IterableDataset, column: str) -> tuple[list[str], dict[str, int]]:
        """The names of the labels, those declared or all that occur; and the number of each as `spell` writes it."""
        feature = rows.features[column] if rows.features is not None else None
        declared = self.data_arguments.class_names or (feature.names if isinstance(feature, ClassLabel) else None)
        if isinstance(rows, IterableDataset):
            if not declared:
                raise InputError("class_names: name them; which labels a stream holds is not known before it is read.")
            rows = rows.take(SEEN)
        found, has_bool = set(), False
        for value in column_values(rows, column):
            if not isinstance(value, str | int | None):
                raise InputError(
                    f"label_column_name: column {column} holds {value!r:.60}; a label is text or a whole number."
                )
            found.add(spell(value))
            has_bool = has_bool or isinstance(value, bool)
        found -= {""}
        are_whole = all(re.fullmatch(r"0|-?[1-9]\d*", label) for label in found)
        names = [str(name) for name in declared or sorted(found, key=int if are_whole else str)]
        if len(names) < 2 or len(set(names)) < len(names):
            raise InputError(f"class_names: two or more different labels are needed, got {', '.join(names)}.")
        spelled = names
        if has_bool:
            spelled = [name.lower() for name in names]  # True, where Python wrote it
        if isinstance(feature, ClassLabel) or (declared and are_whole and not found <= set(spelled)):
            spelled = map(str, range(len(names)))
        return names, {label: number for number, label in enumerate(spelled)}

    def texts(self, rows) -> Iterator[str]:
        words = self.words(names_of(rows))
        return (fill(self.template, row["text"], words[row["label"] % len(words)])[0] for row in rows)

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

    def order(self, rows, split: str):
        """Held-out rows by their length; training rows are shuffled, with `class_balance` rarer labels repeated."""
        if isinstance(rows, IterableDataset):
            return rows
        if split != "train":
            return rows.select(np.argsort(text_lengths(rows), kind="stable"))  # like lengths share a batch
        labels = np.fromiter(column_values(rows, "label"), np.int64)
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        if self.data_arguments.class_balance == "oversample":
            groups = [np.resize(group, max(map(len, groups))) for group in groups]
        order = np.random.default_rng(self.training_arguments.seed).permutation(np.concatenate(groups))
        if len(order) > len(labels):
            logger.warning(f"{split}: rarer labels are repeated, {len(labels):,} examples become {len(order):,}.")
        return rows.select(order)

    def examples(self, rows, tokenizer, split: str, is_class: bool, packing: bool) -> Dataset | IterableDataset:
        """Rows of tokens, of rows in order."""
        size, policy = self.data_arguments.block_size, self.data_arguments.long_examples
        encode = partial(
            encode_labelled,
            template=self.template,
            words=self.words(names_of(rows)),
            block_size=size,
            policy=policy,
            split=split,
            is_class=is_class,
        )
        rows, readers = self.order(rows, split), self.readers(split)
        return build_examples(rows, encode, tokenizer, size, packing, policy, split, is_class, readers=readers)

    def encode_splits(self, data: PreparedData) -> dict[str, Dataset | IterableDataset]:
        if self.data_arguments.baseline and not is_sklearn_available():
            logger.warning("baseline: scikit-learn is not installed, there will be none (pip install scikit-learn).")
        # Rows for testing too, so that what is wrong with them is said before the training.
        return {split: self.encode(rows, data.tokenizer, split) for split, rows in data.rows.items()}

    @abstractmethod
    def probabilities(self, predictions: np.ndarray, names: list[str]) -> np.ndarray:
        """`(examples, labels)` from the trainer's predictions for rows of tokens."""

    def references(self, data: PreparedData, split: str) -> list[int]:
        """The right labels of a held-out split, in the order of its rows of tokens."""
        return list(column_values(self.order(data.rows[split], split), "label"))

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

    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        return self.examples(rows, tokenizer, split, is_class=True, packing=False)

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

    def load(self) -> dict[str, Dataset | IterableDataset]:
        rows, template = super().load(), self.template
        if template.count("{text}") != 1 or template.count("{label}") != 1 or not template.endswith("{label}"):
            raise InputError(f"prompt_template: must hold {{text}} once and end in {{label}}, got {template!r}.")
        self.words(names_of(rows["train"]))  # so that what is wrong with them is said first
        return rows

    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        packing = split == "train" and self.data_arguments.packing
        return self.examples(rows, tokenizer, split, is_class=False, packing=packing)

    def probabilities(self, predictions: np.ndarray, names: list[str]) -> np.ndarray:
        return (-torch.tensor(predictions).double().view(-1, len(names))).softmax(-1).numpy()

    def scores_before(self, trainer: HfLmTrainer, data: PreparedData) -> dict:
        score = self.score(trainer, data) if self.model_arguments.model_name_or_path else {}
        return {"name": "before training", **score} if score else {}
