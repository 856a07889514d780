"""Bits per byte as an `evaluate.Metric`."""

import evaluate
from datasets import Features, Value

from hf_lm.evaluation.text import score_with


class HfLmBitsPerByte(evaluate.Metric):
    """
    Bits a causal language model needs for a text, over its UTF-8 bytes: comparable between tokenizers.

    Example:
        >>> from hf_lm.evaluation.metrics import HfLmBitsPerByte
        >>> HfLmBitsPerByte().compute(predictions=["Call me Ishmael."], model="runs/moby_dick")
        {'bits_per_byte': ..., 'bits_per_byte_low': ..., 'bits_per_byte_high': ..., 'bytes': 16, 'tokens': ...}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: texts; model: folder, Hub id or model; tokenizer: with a model; and the "
            "options of hf_lm.evaluation.text.score_documents.",
            features=Features({"predictions": Value("string")}),
        )

    def _compute(self, predictions: list[str], model, tokenizer=None, **options) -> dict:
        score = score_with(model, tokenizer, predictions, **options).summary()
        keys = ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high", "bytes", "tokens")
        return {key: score[key] for key in keys}
