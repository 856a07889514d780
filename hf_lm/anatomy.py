"""What a model of any family is made of: its layers, its parameters, its operations."""

from torch import nn

from .errors import InputError


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """
    The list of decoder layers of any model of the library.

    Raises:
        InputError: there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers to look into.")
