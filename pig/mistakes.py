"""A parser's mistakes in plain words: what is wrong, and what may have been meant; the whole usage is for `--help`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from pig.errors import InputError

KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "a text",
    "<class 'bool'>": "true or false",
    "dot import path string": "the name of a class, such as pig.methods.bootpig.BootPIG",
    "path": "a path",
}
VALUE = r"(?:Given value|Got value): (.*)"


class PlainErrors:
    """For a jsonargparse parser: its `error` raises an `InputError`."""

    _option_string_actions: dict[str, Any]
    exit_on_error: bool

    def options_of(self, key: str) -> Collection[str]:
        """The options of a class that is given as `--KEY.OPTION`."""
        return ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # one that a parser has made for its own use
            super().error(message, ex)  # type: ignore[misc]
        raise InputError(self.plain(message)) from ex

    def plain(self, message: str) -> str:
        """A mistake that jsonargparse or argparse found."""
        keys = re.findall(r'Parser key "([^"]+)"', message)
        key = ".".join(keys)
        if found := re.search("unrecognized arguments: (\\S+)", message):
            flag = found[1].partition("=")[0]
            return f"{flag} is no option here{meant(flag, self._option_string_actions)}"
        if found := re.search("Option '([^']+)' is not accepted", message):
            return f"{key}.{found[1]} is no option{meant(found[1], self.options_of(keys[0]), f'{key}.')}"
        expected = re.findall(r"Expected (?:an? )?(.*?)(?:\. Got value.*| but .*)?$", message, re.M)
        wanted = [kind_of(one.partition(": ")[0]) for one in expected if "NoneType" not in one]
        values = re.findall(VALUE, message)
        if key and wanted and values:
            given = next((one for one in values if "NestedArg" not in one), values[0])
            given = re.sub(r"NestedArg\(key='(.*?)', val='(.*)'\)", r"\2", given)
            return f"{key}: {given!r} is not {' or '.join(dict.fromkeys(wanted))}"
        return message


def meant(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean X?`, or nothing."""
    near = get_close_matches(word, list(known), 1, 0.7)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def kind_of(told: str) -> str:
    """Of a type as jsonargparse writes it."""
    if found := re.search(r"Literal\[(.*)\]", told):
        return f"one of {found[1]}"
    return KINDS.get(told, told)
