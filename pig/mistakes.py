"""Mistakes on the command line, in plain words: what is wrong, and what may have been meant."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from pig.errors import InputError
from pig.files import read_json, write_text

Settings = TypeVar("Settings")

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
            if not keys:  # of a config file
                own = [flag.removeprefix("--") for flag in self._option_string_actions]
                return f"--config: {found[1]} is no option{meant(found[1], own)}"
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


def values_of(words: Sequence[str], *flags: str) -> list[str]:
    """The words that follow any of these flags, as `--flag value` or `--flag=value`."""
    parts = [word.partition("=") for word in words]
    return [
        value if equals else next(iter(words[at + 1 :]), "")
        for at, (flag, equals, value) in enumerate(parts)
        if flag in flags
    ]


def without(words: Iterable[str], names: Collection[str]) -> Iterator[str]:
    """The words but these flags and what follows them."""
    kept = True
    for word in words:
        if re.match("--?[A-Za-z]", word):
            kept = word.lstrip("-").partition("=")[0].replace("-", "_") not in names
        if kept:
            yield word


def refuse_empty(words: Sequence[str], *flags: str) -> None:
    """`--out ""`, as a shell makes it of an unset variable, would mean the working folder."""
    for flag in flags:
        if any(not value.strip() for value in values_of(words, flag)):
            raise InputError(f"{flag} is empty: give a path")


def read_config(file: str) -> Any:
    """
    Raises:
        InputError: it cannot be read, is no YAML, or unfolds into more than any config holds.
    """
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:
        raise InputError(f"--config {file}: {in_a_line(error)}") from error


def in_a_line(error: BaseException) -> str:
    """What an error says; of one in YAML all, as its place stands behind."""
    told = str(error) or repr(error)
    return " ".join(told.split())[:300] if isinstance(error, YAMLError) else told.splitlines()[0]


def settings_from(kind: type[Settings], file: Path, overrides: Sequence[str]) -> Settings:
    """A dataclass from a YAML file over its defaults, and `key=value` over both.

    Raises:
        InputError: no such file, an unknown key, a value of another type, or a missing one.
    """
    schema = OmegaConf.structured(kind)
    try:
        merged = OmegaConf.merge(schema, OmegaConf.load(file), OmegaConf.from_dotlist(list(overrides)))
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise InputError(f"{missing[0]} must be set, in {file} or as {missing[0]}=VALUE")
        found = OmegaConf.to_object(merged)
    except FileNotFoundError as error:
        raise InputError(f"no such config: {file}") from error
    except ConfigKeyError as error:
        key = str(error.full_key)
        near = get_close_matches(key, list(flat(OmegaConf.to_container(schema))), 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"unknown key {key!r} in {file} or on the command line{hint}") from error
    except InputError:
        raise
    except (OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        where = getattr(error, "full_key", None)
        raise InputError(f"{file}: {f'{where}: ' if where else ''}{in_a_line(error)}") from error
    assert isinstance(found, kind)
    return found


def claim(file: Path, now: Mapping[str, Any], instead: str) -> None:
    """Note in a folder's file what the folder is begun with; go on in it only with the same.

    Raises:
        InputError: it was begun with something else. Names the first difference and, by `instead`, what to do.
    """
    if file.is_file():
        check_claim(file, now, instead)
    write_text(file, json.dumps(now, indent=1) + "\n")


def check_claim(file: Path, now: Mapping[str, Any], instead: str) -> None:
    """The same of a file that is there."""
    then, told = flat(read_json(file, "")), flat(json.loads(json.dumps(now)))
    for key in {**then, **told}:
        if then.get(key) != told.get(key):
            was = f"{file.parent} was begun with {key}={then.get(key)!r}"
            raise InputError(f"{was}, now it is {told.get(key)!r}: {instead}")


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"captions.count": 256, ...}` of a tree of names, and of lists of such trees."""
    if isinstance(tree, Mapping):
        branches = tree.items()
    elif isinstance(tree, list) and any(isinstance(one, Mapping) for one in tree):
        branches = enumerate(tree)  # type: ignore[assignment]
    else:
        return {prefix: tree}
    return {name: leaf for at, one in branches for name, leaf in flat(one, f"{prefix}.{at}".lstrip(".")).items()}
