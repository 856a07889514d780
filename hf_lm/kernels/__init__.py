"""
Faster functions in the place of the model's plain formulas, with the same values and gradients.

`enable` puts them into `KERNELS` of the functional file by name. To add one, write it here, test it against the formula
and add a line to `enable`.
"""

from ..functional_hf_lm import KERNELS
from .gradients import apply_rotary_pos_emb, cosines_and_sines, rms_norm, squared_relu
from .loss import linear_cross_entropy
from .varlen import uses_varlen


def enable() -> None:
    """Let the installed model compute by the functions of this folder. Calling it again changes nothing."""
    for kernel in (apply_rotary_pos_emb, cosines_and_sines, linear_cross_entropy, rms_norm, squared_relu, uses_varlen):
        KERNELS[kernel.__name__] = kernel
