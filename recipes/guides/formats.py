"""Write the table of families and formats into import_export.md: python recipes/guides/formats.py"""

import re
from pathlib import Path

from hf_lm.interop.families import FAMILIES
from hf_lm.interop.gguf_models import MODELS, GgufModel

PAGE = Path(__file__).with_name("import_export.md")
TABLE = re.compile(r"(?<=<!-- formats -->\n).*?(?=<!-- /formats -->)", re.S)
HEAD = """\
| family | native | GGUF | rotary scaling in GGUF | biases in GGUF | in GGUF only | ONNX |
|---|---|---|---|---|---|---|
"""
BIASES = {"attention_bias": "q, k, v", "attention_out_bias": "o", "mlp_bias": "MLP", "lm_head_bias": "head"}


def limits(row: GgufModel) -> list[str]:
    """What a model must have, or has in the file in another way."""
    found = []
    if row.head == "tied":
        found.append("tied embeddings")
    found += [f"`{name}` set" for name in row.needs]
    found += [f"`{name}` as in llama.cpp" for name in row.fixed]
    if row.windows == "period":
        found.append("every n-th layer without window")
    if "gelu" in row.activations:
        found.append("GELU in tanh form")
    return found


def table() -> str:
    """One line for each family and architecture."""
    lines = []
    for name, family in FAMILIES.items():
        native = f"`{family.architecture}`"
        rows = [row for row in MODELS if row.family == name]
        if not rows:
            lines.append(
                f"| {name} | {native} | no: llama.cpp's architecture is not in `gguf_models.py` | | | | yes |"
            )
        for row in rows:
            rope = "none" if family.fixed.get("position_embedding_type") == "learned" else ", ".join(row.rope_types)
            biases = ", ".join(text for name, text in BIASES.items() if name in row.biases) or "none"
            cells = [name, native, f"`{row.architecture}`", rope, biases, "; ".join(limits(row)), "yes"]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return HEAD + "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as the code has it."""
    return TABLE.sub(lambda match: table(), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
