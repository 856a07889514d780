"""Perplexity as an `evaluate.Metric`."""

import evaluate
from datasets import Features, Value

from hf_lm.evaluation.text import score_with


class HfLmPerplexity(evaluate.Metric):
    """
    `exp` of a causal language model's mean negative log-likelihood per token (over all tokens of all texts, not the
    mean of the texts' perplexities). It depends on the tokenizer: compare models that share one.

    Example:
        >>> from hf_lm.evaluation.metrics import HfLmPerplexity
        >>> HfLmPerplexity().compute(predictions=["Call me Ishmael."], model="runs/moby_dick")
        {'perplexity': ..., 'loss': ..., 'tokens': ...}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="as HfLmBitsPerByte",
            features=Features({"predictions": Value("string")}),
        )

    def _compute(self, predictions: list[str], model, tokenizer=None, **options) -> dict:
        score = score_with(model, tokenizer, predictions, **options)
        return {"perplexity": score.perplexity, "loss": score.loss, "tokens": sum(score.tokens)}
