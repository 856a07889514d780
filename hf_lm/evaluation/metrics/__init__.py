"""
Metrics as `evaluate.Metric` classes: imported from here, or by `evaluate.load("hf_lm/evaluation/metrics/perplexity.py")`;
both work without a network. `evaluate` takes the first metric class of a file, hence a file each.
"""

from .bits_per_byte import HfLmBitsPerByte
from .classification import HfLmClassification
from .perplexity import HfLmPerplexity

__all__ = ["HfLmBitsPerByte", "HfLmClassification", "HfLmPerplexity"]
