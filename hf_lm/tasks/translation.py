"""Translate: `source <|en-de|> target`, of which only the target is learned; several pairs of languages in one model."""

import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset, Features, IterableDataset, Value
from transformers.utils import logging

from ..data.documents import cells_as_text, column_names, column_values, load_rows, task_hint
from ..data.examples import Example, Say, build_examples
from ..errors import InputError
from ..evaluation.translation import (
    BEAMS,
    encode_sources,
    encode_targets,
    languages,
    score_translations,
    tag,
    translate,
)
from ..training.trainer import HfLmTrainer
from .base import PreparedData, Task

logger = logging.get_logger(__name__)
TEXTS = Features({name: Value("string") for name in ("source", "target", "pair")})
BATCH = 100  # examples tokenised at once


def texts_of_pairs(batch: dict[str, list], pairs: list[str]) -> dict[str, list[str]]:
    """The `source`, `target` and `pair` of each example that rows make, without those of which a text is empty."""
    found: dict[str, list[str]] = {name: [] for name in TEXTS}
    columns = [(pair, *(batch[language] for language in languages(pair))) for pair in pairs]
    for number in range(len(next(iter(batch.values())))):
        for pair, sources, targets in columns:
            texts = sources[number], targets[number]
            if all(isinstance(text, str) and text.strip() for text in texts):
                for name, value in zip(TEXTS, (*texts, pair), strict=True):
                    found[name].append(value)
    return found


def check_count(count: int, rows: int, pair: str, split: str) -> None:
    """
    Say how many rows make no example of a pair.

    Raises:
        InputError: none does.
    """
    if not count:
        raise InputError(f"language_pairs: {split} has no text in both languages of {pair}.")
    if count < rows:
        logger.warning(f"{split}: {rows - count} of {rows} examples of {pair} are empty and left out.")


def encode_texts(rows: Iterator[dict], tokenizer, say: Say) -> Iterator[Example]:
    """Examples of which the target is learned, and that it ends."""
    while batch := list(islice(rows, BATCH)):
        sources, targets, pairs = ([row[name] for row in batch] for name in TEXTS)
        prompts, answers = encode_sources(tokenizer, sources, pairs), encode_targets(tokenizer, targets)
        for prompt, answer, text in zip(prompts, answers, targets, strict=True):
            yield Example(prompt + answer, [False] * len(prompt) + [True] * len(answer), len(text.encode()))


class Translation(Task):
    """
    Parallel texts: a column for each language, or one column `translation` of `{language: text}`.

    The examples of all `language_pairs` are shuffled once, by the seed. The part held out for testing (or else for
    validation) is translated at the end by beam search.
    """

    result_names = {**Task.result_names, "bleu": "BLEU", "chrf": "chrF"}

    @property
    def columns(self) -> list[str]:
        """
        The languages, each of which is a column of the rows.

        Raises:
            InputError: no pair of languages is named.
        """
        if not self.data_arguments.language_pairs:
            raise InputError("language_pairs: name at least one, as [en-de, de-en].")
        return list(dict.fromkeys(name for pair in self.data_arguments.language_pairs for name in languages(pair)))

    def text_language(self) -> str | list[str]:
        return self.model_arguments.language or self.columns

    def load(self) -> dict[str, Dataset | IterableDataset]:
        columns = self.columns
        if find_spec("sacrebleu") is None:
            raise InputError("task: translations are scored by sacrebleu; pip install 'hf-lm[translation]'.")

        def keep(rows, where: str):
            if "translation" in (rows.column_names or []):
                rows = rows.map(lambda row: row["translation"], remove_columns="translation")
            found = column_names(rows)
            if missing := [language for language in columns if language not in found]:
                names = ", ".join(found)
                raise InputError(
                    f"language_pairs: {where} has no column {missing[0]}; it has {names}.{task_hint(found)}"
                )
            return cells_as_text(rows.select_columns(columns), columns, where)

        return load_rows(self.data_arguments, keep)

    def texts(self, rows) -> Iterator[str]:
        return (row[language] for row in rows for language in self.columns if row[language])

    def complete_tokenizer(self, tokenizer) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("tokenizer_name: the tokenizer has no eos token, without which no translation ends.")
        tags = [tag(pair) for pair in self.data_arguments.language_pairs]
        tokenizer.add_special_tokens({"extra_special_tokens": tags}, replace_extra_special_tokens=False)

    def _texts_of_pairs(self, rows, split: str) -> Dataset | IterableDataset:
        """
        Rows of source, target and pair, without those of which a text is empty; of a table, shuffled by the seed.

        Raises:
            InputError: a table has none of one pair.
        """
        pairs = self.data_arguments.language_pairs
        made = rows.map(
            partial(texts_of_pairs, pairs=pairs), batched=True, remove_columns=column_names(rows), features=TEXTS
        )
        if isinstance(rows, IterableDataset):
            return made
        numbers = np.fromiter(map(pairs.index, column_values(made, "pair")), np.int64)
        for number, pair in enumerate(pairs):
            check_count(int((numbers == number).sum()), len(rows), pair, split)
        order = np.random.default_rng(self.training_arguments.seed).permutation(len(numbers))
        return made.select(np.argsort(numbers, kind="stable")[order])

    def encode(self, rows, tokenizer, split: str) -> Dataset | IterableDataset:
        data, texts = self.data_arguments, self._texts_of_pairs(rows, split)
        options = {"packing": data.packing, "policy": data.long_examples, "where": split}
        return build_examples(texts, encode_texts, tokenizer, data.block_size, **options, readers=self.readers(split))

    def generation_defaults(self) -> dict:
        beam_search = {"do_sample": False, "num_beams": BEAMS, "early_stopping": True}
        return {**beam_search, "max_new_tokens": self.data_arguments.block_size // 2}

    def scores(self, trainer: HfLmTrainer, data: PreparedData, before: dict) -> dict:
        held_out = super().scores(trainer, data, before)
        split = "test" if "test" in data.rows else "validation"
        if split not in data.rows:
            return held_out
        arguments, model = trainer.args, trainer.model.eval()
        scores, copied = {}, {"name": "copying the source"}
        for pair in self.data_arguments.language_pairs:
            texts = texts_of_pairs(data.rows[split][:], [pair])
            sources, references = texts["source"], texts["target"]
            check_count(len(sources), len(data.rows[split]), pair, split)
            shares = 1 if trainer.is_sharded else arguments.world_size
            mine = sources[arguments.process_index % shares :: shares]
            parts = gather_object([translate(model, trainer.processing_class, mine, pair)])[:shares]
            found = [parts[number % len(parts)][number // len(parts)] for number in range(len(sources))]
            for group, texts in ((scores, found), (copied, sources)):
                results = score_translations(texts, references, languages(pair)[1])
                group |= {f"{name}/{pair}": value for name, value in results.items()}
            if arguments.process_index == 0:
                print(self._line(pair, scores, copied), file=sys.stderr)
        return {**scores, **held_out, "split": split, "num_beams": BEAMS, "baselines": [copied]}

    @staticmethod
    def _line(pair: str, scores: dict, copied: dict) -> str:
        values = (group[f"{name}/{pair}"] for group in (scores, copied) for name in ("chrf", "bleu"))
        return "{}: chrF {:.1f}, BLEU {:.1f} (copying the source: {:.1f}, {:.1f})".format(pair, *values)

    @staticmethod
    def usage(metrics: dict) -> str | None:
        pair = next((key.partition("/")[2] for key in metrics if key.startswith("chrf/")), None)
        return pair and (
            f'inputs = tokenizer("Open the file.{tag(pair)}", return_tensors="pt", return_token_type_ids=False)\n'
            "output = model.generate(**inputs)\n"
            'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
        )

    def summary(self, metrics: dict) -> str:
        scored = [pair for pair in self.data_arguments.language_pairs if f"chrf/{pair}" in metrics]
        lines = [self._line(pair, metrics, metrics["baselines"][0]) for pair in scored]
        return "; ".join(lines) or super().summary(metrics)
