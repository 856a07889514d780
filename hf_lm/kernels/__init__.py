"""
Faster functions in the place of the model's plain formulas, with the same values and gradients.

`enable` puts them into `KERNELS` of the functional file: functions by their name, activations by their `hidden_act`. To
add one, write it here, test it against the formula and add a line to `enable`.
"""

from ..functional_hf_lm import KERNELS
from .gradients import SquaredReLU, apply_rotary_pos_emb, cosines_and_sines, rms_norm
from .loss import linear_cross_entropy
from .varlen import uses_varlen


def enable() -> None:
    """Let the installed model compute by the functions of this folder. Calling it again changes nothing."""
    for kernel in (apply_rotary_pos_emb, cosines_and_sines, linear_cross_entropy, rms_norm, uses_varlen):
        KERNELS[kernel.__name__] = kernel
    KERNELS["relu2"] = SquaredReLU
