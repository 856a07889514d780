"""Strategies that damage good files: values of a JSON document, its text, its bytes."""

import json
from typing import Any

from hypothesis import strategies as st

DEEP = 3000  # levels, beyond Python's recursion limit


class Raw(str):
    """Text that stands in a JSON file as it is."""


HOSTILE = (
    None, True, False, 0, 1, -1, 3, 1000, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e308, Raw("NaN"), Raw("-Infinity"),
    Raw("1e999"), "", " ", "\0", "0", "none", "x" * 5000, Raw('"\\ud800"'), "../../outside", "/etc/passwd", "a\nb", "é鲸\u202e",
    "{{ 1 / 0 }}", "__import__('os').system('touch EXECUTED')", [], [[]], [None], [0], ["a", "b"], {}, {"a": {"b": []}},
    Raw("[" * DEEP + "]" * DEEP),
)  # fmt: skip


def paths_of(document: Any, prefix: tuple = ()) -> list[tuple]:
    """The place of every value in a JSON document; of long lists and tables the first twenty."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    inner = [path for key, value in list(items)[:20] for path in paths_of(value, (*prefix, key))]
    return [prefix, *inner]


def replaced(document: Any, path: tuple, change) -> Any:
    """A copy in which `change(container, key)` was called on the copy of what holds the value at `path`."""
    if not path:
        holder = [document]
        change(holder, 0)
        return holder[0] if holder else None
    copy = document.copy()
    if len(path) == 1:
        change(copy, path[0])
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], change)
    return copy


def text_of(value: Any) -> str:
    """JSON; the elements of `Raw` as they are."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {text_of(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return json.dumps(value)


@st.composite
def damaged_values(draw, document: Any, hostile=HOSTILE, at_most: int = 2) -> Any:
    """The document with values replaced, removed, added or wrapped."""
    for _ in range(draw(st.integers(1, at_most))):
        path = draw(st.sampled_from(paths_of(document)))
        value = draw(st.sampled_from(hostile))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "wrap")))

        def change(holder, key, kind=kind, value=value):
            if kind == "remove":
                del holder[key]
            elif kind == "add" and isinstance(holder[key], dict):
                holder[key] = holder[key] | {"surprise": value}
            elif kind == "add" and isinstance(holder[key], list):
                holder[key] = [*holder[key], value]
            else:
                holder[key] = [holder[key]] if kind == "wrap" else value

        document = replaced(document, path, change)
    return document


@st.composite
def damaged_bytes(draw, content: bytes) -> bytes:
    """A file cut, doubled, with other bytes in it, in another encoding."""
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    junk = draw(
        st.one_of(
            st.sampled_from((b"\0", b"\xff\xfe", b"\n", b"{", b"]", b'"', b"\\", b"\xed\xa0\x80")),
            st.binary(max_size=8),
        )
    )
    kind = draw(st.sampled_from(("cut", "insert", "overwrite", "bom", "utf-16", "twice", "nothing", "junk", "crlf")))
    if kind == "utf-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    return {
        "cut": content[:place],
        "insert": content[:place] + junk + content[place:],
        "overwrite": content[:place] + junk + content[place + len(junk) :],
        "bom": b"\xef\xbb\xbf" + content,
        "twice": content + content,
        "nothing": b"",
        "junk": junk,
        "crlf": content.replace(b"\n", b"\r\n"),
    }[kind]


@st.composite
def duplicated_key(draw, document: dict) -> str:
    """One key twice, with two values."""
    key, value = draw(st.sampled_from(sorted(document))), draw(st.sampled_from(HOSTILE))
    return text_of(document)[:-1] + f", {json.dumps(key)}: {text_of(value)}}}"


@st.composite
def damaged_json(draw, document: Any, at_most: int = 2) -> bytes:
    """A JSON file, damaged in one way or another; mostly still JSON."""
    kind = draw(st.sampled_from(("values", "values", "values", "values", "bytes", "key")))
    if kind == "bytes":
        return draw(damaged_bytes(json.dumps(document, indent=1).encode()))
    if kind == "key" and isinstance(document, dict):
        return draw(duplicated_key(document)).encode()
    return text_of(draw(damaged_values(document, at_most=at_most))).encode("utf-8", "surrogatepass")
