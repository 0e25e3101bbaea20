"""HTML pages by jinja2: what is filled in is escaped, and a value that is missing is an error."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["Markup", "data_uri", "render"]


def render(template: Path, **values: Any) -> str:
    """The page of a template, which may import `table.html`; a `Markup` is filled in as it is."""
    folders = [template.parent, Path(__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # in the order of the data
    environment.filters["words"] = columns_of_words
    return environment.get_template(template.name).render(**values)


def columns_of_words(rows: Iterable[Sequence[str]], count: int) -> list[bool]:
    """Of each of so many columns whether a cell of it has a letter; rows may be shorter, and there may be none."""
    columns = zip_longest(*rows, [""] * count, fillvalue="")
    return [any(letter.isalpha() for cell in column for letter in Markup(cell).striptags()) for column in columns]


def data_uri(picture: bytes, kind: str) -> str:
    """A picture as an address, so that a page is one file. kind: `png` or `jpeg`."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
