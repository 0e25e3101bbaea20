"""Command-line arguments from a function's signature and docstring, flat, whatever dataclasses they are grouped in."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse

from pig.errors import InputError
from pig.mistakes import PlainErrors, read_config, refuse_empty, values_of
from pig.models.names import FORMS, TOYWORLD

if TYPE_CHECKING:
    from pig.methods import Source
    from pig.sampling.settings import Control


class Parser(PlainErrors, jsonargparse.ArgumentParser):
    """Its mistakes are `InputError`s."""


SETTINGS = "settings"  # the parameter that takes a model's controls


def parse(
    prog: str, target: str, words: Sequence[str], source: Source | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function `module:name`, and the values that the words give its parameters.

    Parameters become flags: a list takes several words, a bool is a switch, a positional-only list stands without a
    flag, the fields of a dataclass are flags of their own. A parameter `settings` takes the controls of the model that
    `--model` names, whose flags and defaults are then those of that model; or, before it is there, of `source`.
    """
    module, _, name = target.partition(":")
    function = getattr(import_module(module), name)
    # `--save-references` is `--save_references`, with or without `=...`.
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    described = docstring_parser.parse(function.__doc__ or "")
    parser = Parser(prog=prog, description=described.short_description)
    parser.add_argument("--config", action="config", help="a YAML file with any of these arguments")
    helps = {one.arg_name: one.description or "" for one in described.params}
    hints = get_type_hints(function)
    groups: dict[str, type] = {}
    positional = []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints[parameter.name]
        if parameter.name == SETTINGS:
            continue
        if (group := _dataclass_of(hint)) is not None:
            groups[parameter.name] = group
            fields, own = get_type_hints(group), docstring_parser.parse_from_object(group)
            told = {one.arg_name: one.description or "" for one in own.params}
            for field in dataclasses.fields(group):
                _add(parser, field.name, fields[field.name], field.default, told[field.name])
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(parameter.name)
        _add(parser, parameter.name, hint, parameter.default, helps[parameter.name], parameter.name in positional)
    if positional:
        words = _together(words, {f"--{name}" for name, hint in hints.items() if hint is bool})
    told_hints = {name: hint for kind in (*groups.values(), function) for name, hint in get_type_hints(kind).items()}
    paths = [name for name, hint in told_hints.items() if Path in (hint, *get_args(hint))]
    refuse_empty(words, *(f"--{name}" for name in paths))
    for config in values_of(words, "--config"):
        named = read_config(config)
        for name in paths if isinstance(named, Mapping) else ():
            if named.get(name) == "":
                raise InputError(f"{config}: {name} is empty: name a file or folder")
    asked: dict[str, str] = {}  # flag -> control
    if SETTINGS in hints:
        asked = _add_controls(parser, words, source)
    values = parser.parse_args(list(words)).as_dict()
    values.pop("config")
    settings = {control: values.pop(control) for control in dict.fromkeys(asked.values())}
    for name, group in groups.items():
        values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
    if SETTINGS in hints:
        values[SETTINGS] = settings
    first = [values.pop(name) for name in positional]
    return (lambda **rest: function(*first, **rest)) if first else function, values


def _together(words: Sequence[str], switches: Collection[str]) -> list[str]:
    """`FILE --dry_run key=value` as `FILE key=value --dry_run`: argparse takes positional words in one place only."""
    kept: list[str] = []
    late: list[str] = []
    for word in words:
        before = kept[-1] if kept else ""
        (late if before in switches and not word.startswith("-") and "=" in word else kept).append(word)
    return [*kept[:1], *late, *kept[1:]] if kept and not kept[0].startswith("-") else list(words)


def _add(
    parser: jsonargparse.ArgumentParser, name: str, hint: Any, default: Any, told: str, positional: bool = False
) -> None:
    told = told.replace("MODEL_FORMS", FORMS)
    kinds = [one for one in (hint, *get_args(hint)) if get_origin(one) is list]
    flag = name if positional else f"--{name}"
    if hint is bool:
        parser.add_argument(flag, action="store_true", help=told)
    elif kinds:  # as everyone types them, `--references a.jpg b.jpg`; jsonargparse's own form is `[a.jpg,b.jpg]`
        more = {} if positional or default is dataclasses.MISSING else {"default": None}
        parser.add_argument(flag, nargs="+", type=get_args(kinds[0])[0], help=told, **more)
    elif default in (inspect.Parameter.empty, dataclasses.MISSING):
        parser.add_argument(flag, type=hint, required=True, help=told)
    else:
        parser.add_argument(flag, type=hint, default=default, help=told)


def _dataclass_of(hint: Any) -> type | None:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((one for one in kinds if dataclasses.is_dataclass(one) and isinstance(one, type)), None)


def _add_controls(parser: jsonargparse.ArgumentParser, words: Sequence[str], source: Source | None) -> dict[str, str]:
    """Flags of the controls of the model that the words name, with that model's defaults; flag -> control."""
    from pig.methods import find_model, pipeline_class  # not for commands without a model: imports of seconds
    from pig.sampling.settings import controls

    model = _named_model(words)
    source = source or find_model(model)
    group = parser.add_argument_group(f"controls of {model} ({source.method})")
    found: dict[str, str] = {}
    for one in controls(pipeline_class(source.method).Settings):
        flags = [f"--{name}" for name in (one.name, one.alias) if name]
        default = source.settings.get(one.name, one.default)
        default = list(default) if one.kind is tuple else default
        group.add_argument(*flags, default=default, help=one.help.rstrip(".") + _range(one), **_type(one))
        found |= {name: one.name for name in (one.name, one.alias) if name}
    return found


def _type(one: Control) -> dict[str, Any]:
    if one.kind is tuple:
        return {"nargs": "+", "type": float}
    if one.kind is bool:
        return {"action": jsonargparse.ActionYesNo(no_prefix="no_")}
    if one.choices:
        choices = tuple(choice for choice in one.choices if choice is not None)
        return {"type": Literal[choices] | None if one.optional else Literal[choices]}
    return {"type": one.kind | None if one.optional else one.kind}


def _range(one: Control) -> str:
    low, high = one.range
    if one.kind not in (int, float) or low == -float("inf"):
        return ""
    return f"; at least {low:g}" if high == float("inf") else f"; from {low:g} to {high:g}"


def _named_model(words: Sequence[str]) -> str:
    """`--model` of the command line, else of a config file, else the embedded one."""
    model = TOYWORLD
    for config in values_of(words, "--config"):
        told = read_config(config)
        if isinstance(told, Mapping) and told.get("model"):
            model = str(told["model"])
    return next(reversed(values_of(words, "--model")), model)
