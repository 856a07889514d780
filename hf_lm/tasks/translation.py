"""Translate: `source <|en-de|> target`, of which only the target is learned; several pairs of languages in one model."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..data.documents import cells_as_text, load_rows, task_hint
from ..data.examples import Example, build_examples
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


class Translation(Task):
    """
    Parallel texts: a column for each language, or one column `translation` of `{language: text}`.

    The examples of all `language_pairs` are shuffled once, by the seed. What is held out for testing (or else for
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
            found = rows.column_names or list(next(iter(rows), {}))
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

    def _parallel(self, rows, pair: str, split: str) -> tuple[list[str], list[str]]:
        """
        Sources and targets of a pair, without those of which one is empty.

        Raises:
            InputError: nothing is left.
        """
        source, target = languages(pair)
        both = [(row[source], row[target]) for row in rows]
        whole = [texts for texts in both if all(isinstance(text, str) and text.strip() for text in texts)]
        if not whole:
            raise InputError(f"language_pairs: {split} has no text in both languages of {pair}.")
        if len(whole) < len(both):
            logger.warning(
                f"{split}: {len(both) - len(whole)} of {len(both)} examples of {pair} are empty and left out."
            )
        sources, targets = zip(*whole, strict=True)
        return list(sources), list(targets)

    def encode(self, rows, tokenizer, split: str) -> Dataset:
        examples = []
        for pair in self.data_arguments.language_pairs:
            sources, targets = self._parallel(rows, pair, split)
            prompts, answers = encode_sources(tokenizer, sources, pair), encode_targets(tokenizer, targets)
            for prompt, answer, text in zip(prompts, answers, targets, strict=True):
                learned = [False] * len(prompt) + [True] * len(answer)
                examples.append(Example(prompt + answer, learned, len(text.encode())))
        np.random.default_rng(self.training_arguments.seed).shuffle(examples)
        data = self.data_arguments
        return build_examples(examples, lambda one: [one], data.block_size, data.packing, data.long_examples, split)

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
            sources, references = self._parallel(data.rows[split], pair, split)
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
