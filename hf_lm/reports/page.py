"""Results as one HTML page that needs nothing else: no network, no library."""

import base64
import json
from pathlib import Path

import torch

from ..files import write_text


def write_page(template: str, data: dict, path: str | Path) -> None:
    """
    Put data into a page of this folder and write it atomically.

    Args:
        template: name of the HTML file, whose `__DATA__` is replaced.
        data: what JSON can hold, and tensors of values from 0 to 1, which are written as bytes in base64.
    """

    def encoded(value):
        if isinstance(value, torch.Tensor):
            levels = (value.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
            return {"shape": list(value.shape), "bytes": base64.b64encode(levels.tobytes()).decode()}
        raise TypeError(f"{type(value).__name__} cannot be written into a page.")

    text = json.dumps(data, default=encoded, allow_nan=False).replace("<", "\\u003c")  # no tag can end the script
    page = (Path(__file__).parent / template).read_text(encoding="utf-8").replace("__DATA__", text)
    write_text(Path(path), page)
