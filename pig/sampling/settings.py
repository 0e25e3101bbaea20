"""A method's controls, listed once: pipelines, command-line flags, the page, checks and manifests derive from here.

A control is a field of a frozen dataclass: its annotation is its type (a `Literal` lists its values), the string below
it is its help, `control` gives default and range.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import docstring_parser

from pig.errors import InputError, check_named, check_ranges
from pig.models.backbone import SchedulerName


def control(
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    slider: tuple[float, float] | None = None,
    alias: str | None = None,
) -> Any:
    """A field of `SamplingSettings`.

    Args:
        low, high: the range, both included.
        slider: the part of the range that a page's slider offers; the range itself by default.
        alias: a second name, by which it may be given as well.
    """
    return dataclasses.field(default=default, metadata={"range": (low, high), "slider": slider, "alias": alias})


@dataclass(frozen=True)
class SamplingSettings:
    """The controls of every method."""

    num_inference_steps: int = control(50, 1, slider=(1, 100), alias="steps")
    """Steps of the sampler."""
    text_guidance: float = control(7.5, 0, 1000, slider=(0, 15), alias="guidance_scale")
    """How closely to follow the prompt (classifier-free guidance)."""
    negative_prompt: str = control("")
    """What the image should not show; it replaces the empty prompt in the guidance."""
    guidance_rescale: float = control(0.0, 0, 1)
    """Brings the contrast of strongly guided images back (arXiv 2305.08891, 3.4)."""
    guidance_interval: tuple[float, float] = control((0.0, 1.0), 0, 1)
    """Faster, but changes the image: the part of the steps that has guidance, as start and end from 0 to 1. At all
    other steps the network is evaluated only once, with prompt and references (arXiv 2404.07724)."""
    scheduler: SchedulerName | None = control(None)
    """The sampler; by default the model's own."""

    def __post_init__(self) -> None:
        """
        Raises:
            InputError: a value out of its range, or none of those listed.
        """
        for one in controls(type(self)):
            value = getattr(self, one.name)
            if one.choices:
                check_named(one.name, value, one.choices)
                continue
            if value is None and one.optional:
                continue
            if one.kind in (int, float):
                low, high = one.range
                if isinstance(value, bool) or not isinstance(value, one.kind | int):
                    wanted = "a whole number" if one.kind is int else "a number"
                    raise InputError(f"{one.name} must be {wanted}, got {value!r}")
                check_ranges(**{one.name: (value, low, high)})
            elif one.kind in (str, bool) and not isinstance(value, one.kind):
                wanted = "a text" if one.kind is str else "true or false"
                raise InputError(f"{one.name} must be {wanted}, got {value!r}")
            elif one.kind is tuple:
                object.__setattr__(self, one.name, _pair(one.name, value))

    @classmethod
    def given(cls, model: Mapping[str, Any], call: Mapping[str, Any]) -> Self:
        """Merge settings: a call's go before the model's own defaults, those before the class's. None: not named, but
        for a control whose value it can be.

        Raises:
            InputError: a control that the method does not have, or a value it does not take.
        """
        known = {name: one.name for one in controls(cls) for name in (one.name, one.alias) if name}
        optional = {one.name for one in controls(cls) if one.optional}
        named = {name: value for name, value in call.items() if value is not None or name in optional}
        for one in controls(cls):
            if one.alias in named and one.name in named:
                raise InputError(f"{one.name} and {one.alias} are the same control: give one of them")
        for name in {*named, *model} - known.keys():
            raise InputError(
                f"{name!r} is no control of this method; it has: {', '.join(dict.fromkeys(known.values()))}"
            )
        return cls(**{known[name]: value for name, value in {**model, **named}.items()})

    def as_json(self) -> dict[str, Any]:
        """As JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _pair(name: str, value: Any) -> tuple[float, float]:
    """Two shares of the steps, the first not above the second."""
    try:
        low, high = (float(one) for one in value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is two shares of the steps, got {value!r}") from error
    check_ranges(**{name: (low, 0, high), f"{name}_end": (high, 0, 1)})
    return low, high


@dataclass(frozen=True)
class Control:
    """What is known of one control. kind: `int`, `float`, `str`, `bool` or `tuple` (of two numbers); choices: of a
    `Literal`; optional: it may be None."""

    name: str
    kind: type
    default: Any
    choices: tuple[Any, ...]
    optional: bool
    range: tuple[float, float]
    slider: tuple[float, float]
    alias: str | None
    help: str


def controls(settings: Any) -> tuple[Control, ...]:
    """The controls of a class of settings, in their order."""
    return _controls(settings)


@cache
def _controls(settings: Any) -> tuple[Control, ...]:
    helps = _helps(settings)
    hints = get_type_hints(settings)
    found = []
    for field in dataclasses.fields(settings):
        kind, optional = hints[field.name], False
        if get_origin(kind) in (Union, types.UnionType):
            (kind,), optional = (one for one in get_args(kind) if one is not type(None)), True
        choices = ((None,) if optional else ()) + get_args(kind) if get_origin(kind) is Literal else ()
        kind = type(choices[-1]) if choices else get_origin(kind) or kind
        if kind not in (int, float, str, bool, tuple):
            raise TypeError(f"{settings.__name__}.{field.name}: no control can be a {kind}")
        limits = field.metadata["range"]
        found.append(
            Control(
                name=field.name,
                kind=kind,
                default=field.default,
                choices=choices,
                optional=optional,
                range=limits,
                slider=field.metadata["slider"] or limits,
                alias=field.metadata["alias"],
                help=helps[field.name],
            )
        )
    return tuple(found)


def _helps(settings: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed([one for one in inspect.getmro(settings) if dataclasses.is_dataclass(one)]):
        for one in docstring_parser.parse_from_object(base).params:
            found[one.arg_name] = " ".join((one.description or "").split())
    return found


def signed(call: Any, settings: Any) -> Any:
    """The same function, whose signature shows the controls in place of `**settings`."""

    @functools.wraps(call)
    def own(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    shown = [one for one in inspect.signature(call).parameters.values() if one.kind is not one.VAR_KEYWORD]
    shown += [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default) for one in controls(settings)
    ]
    own.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return own
