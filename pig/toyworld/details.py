"""What the drawn objects bear: patterns, emblems, accessories, and where each object wears them.

Object coordinates as in `pig.toyworld.shapes`: x right, y down, the object within about [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pig.toyworld.shapes import Part, Points, arc, box, ellipse, polygon

# -- patterns: the secondary colour covers at most two fifths, so that the main colour is the one that is named --------

PATTERNS = ("plain", "half", "band", "stripes", "bars", "checks", "dots")


def pattern_of(pattern: str, shift: float) -> Iterator[Points]:
    """The places of the secondary colour; `shift` moves them. Features are at least 0.36 object units wide."""
    grid = np.arange(-1.7, 1.8, 0.95)
    match pattern:
        case "half":
            yield box(-2, 0.3 + shift, 2, 2)
        case "band":
            yield box(-2, -0.2 + shift, 2, 0.22 + shift)
        case "stripes":
            for y in grid:
                yield box(-2, y + shift, 2, y + 0.38 + shift)
        case "bars":
            for x in grid:
                yield box(x + shift, -2, x + 0.38 + shift, 2)
        case "checks":
            for i, x in enumerate(np.arange(-1.7, 1.8, 0.5)):
                for y in np.arange(-1.7, 1.8, 1.0) + 0.5 * (i % 2):
                    yield box(x + shift, y, x + shift + 0.42, y + 0.42)
        case "dots":
            for i, x in enumerate(np.arange(-1.5, 1.6, 0.5)):
                for y in np.arange(-1.5 + 0.3 * (i % 2), 1.6, 0.6):
                    yield ellipse(x + shift, y, 0.19, 0.19)


# -- emblems: outlines within the unit circle ------------------------------------------------------------------------


def _star() -> Points:
    turn = 2 * np.pi * (np.arange(10) / 10 - 0.25)
    return np.where(np.arange(10) % 2, 0.45, 1.0)[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)


def _heart() -> Points:
    turn = np.linspace(0, 2 * np.pi, 40)
    x = np.sin(turn) ** 3
    y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16
    return np.stack([x, y], 1)


def _moon() -> Points:
    outer, inner = ellipse(0, 0, 0.95, 0.95, 0.12, 0.88), ellipse(0.45, 0, 0.62, 0.7, 0.14, 0.86)
    return np.concatenate([outer, inner[::-1]])


def _letter_h() -> Points:
    half, bar = 0.75, 0.22
    left = [(-half, -0.9), (-half + 0.48, -0.9), (-half + 0.48, -bar), (half - 0.48, -bar), (half - 0.48, -0.9)]
    return polygon(*left, (half, -0.9), *[(-x, -y) for x, y in left], (-half, 0.9))


EMBLEMS: dict[str, Points] = {
    "star": _star(),
    "heart": _heart(),
    "moon": _moon(),
    "ring": arc(0, 0, 0.95, 0.95, 0.42),
    "bolt": polygon((0.25, -1), (-0.65, 0.2), (-0.08, 0.2), (-0.3, 1), (0.65, -0.25), (0.08, -0.25)),
    "diamond": polygon((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),
    "arrow": polygon((0, -1), (0.9, 0.05), (0.32, 0.05), (0.32, 0.95), (-0.32, 0.95), (-0.32, 0.05), (-0.9, 0.05)),
    "cross": polygon(*[(c * x - s * y, s * x + c * y) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
                       for x, y in ((0.95, -0.3), (0.95, 0.3), (0.3, 0.3))]),
    "letter H": _letter_h(),
    "letter T": polygon((-0.9, -0.9), (0.9, -0.9), (0.9, -0.38), (0.27, -0.38), (0.27, 0.95), (-0.27, 0.95),
                        (-0.27, -0.38), (-0.9, -0.38)),
}  # fmt: skip

# -- where an object wears things --------------------------------------------------------------------------------------

Place = tuple[float, float]


@dataclass(frozen=True)
class Fit:
    """The places of one object, in object coordinates.

    top: middle of a hat's brim. face: between the lenses of glasses. neck: middle of a scarf or bow, and half the
    scarf's length. emblem: its middle, and its radius; `room`: how far an individual's own emblem may be from there.
    """

    top: Place
    face: Place
    neck: tuple[float, float, float]
    emblem: tuple[float, float, float]
    room: Place = (0.1, 0.06)


def _boat(a: float, b: float, c: float) -> Fit:
    mast = 0.1 * a
    return Fit((mast, -0.93), (0.0, 0.6), (0.0, 0.3, 0.6), (0.37 + mast, -0.08, 0.25), (0.04, 0.05))


def _boot(a: float, b: float, c: float) -> Fit:
    shaft, top = 0.36 + 0.1 * a, -0.92 + 0.3 * b
    x = -0.6 + shaft
    return Fit((x, top), (x, -0.16), (x, -0.22, shaft + 0.08), (-0.1, 0.36, 0.28), (0.2, 0.04))


def _car(a: float, b: float, c: float) -> Fit:
    return Fit((-0.05, -0.5 - 0.15 * a), (-0.05, -0.24), (-0.05, 0.0, 0.7), (0.0, 0.26, 0.23), (0.12, 0.02))


def _cat(a: float, b: float, c: float) -> Fit:
    return Fit((0.0, -0.64), (0.0, -0.25), (0.0, 0.27, 0.5), (0.0, 0.66, 0.27), (0.14, 0.04))


def _fish(a: float, b: float, c: float) -> Fit:
    tall = 0.42 + 0.16 * a
    return Fit((-0.3, -tall + 0.04), (-0.56, -0.1), (-0.2, tall - 0.14, 0.55), (0.05, -0.02, 0.27), (0.1, 0.05))


def _lamp(a: float, b: float, c: float) -> Fit:
    return Fit((0.0, -0.92), (0.0, -0.7), (0.0, 0.2, 0.38), (0.0, -0.24, 0.28), (0.16, 0.04))


def _mug(a: float, b: float, c: float) -> Fit:
    half, top = 0.5 + 0.15 * a, -0.75 + 0.25 * b
    return Fit((0.0, top), (0.0, -0.16), (0.0, -0.18, half + 0.08), (0.0, 0.42, 0.3), (0.12, 0.06))


def _robot(a: float, b: float, c: float) -> Fit:
    chest = 0.4 + 0.12 * b
    return Fit((0.0, -0.78), (0.0, -0.49), (0.0, -0.12, chest + 0.1), (0.0, 0.28, 0.28), (0.08, 0.04))


def _rocket(a: float, b: float, c: float) -> Fit:
    half = 0.28 + 0.1 * a
    return Fit((0.0, -0.72), (0.0, -0.1 + 0.2 * c), (0.0, -0.38, half + 0.12), (0.0, 0.48, 0.24), (0.03, 0.03))


def _teapot(a: float, b: float, c: float) -> Fit:
    tall = 0.48 + 0.14 * a
    return Fit((0.0, 0.14 - tall), (0.0, -0.02), (0.0, 0.0, 0.6), (0.0, 0.4, 0.26), (0.2, 0.03))


def _umbrella(a: float, b: float, c: float) -> Fit:
    tall = 0.75 + 0.17 * a
    return Fit((0.0, -tall + 0.06), (0.0, -0.14), (0.0, 0.25, 0.34), (0.0, -0.5, 0.26), (0.25, 0.03))


def _vase(a: float, b: float, c: float) -> Fit:
    belly = 0.25 - 0.3 * c
    return Fit((0.0, -0.9), (0.0, belly - 0.5), (0.0, belly - 0.55, 0.36), (0.0, belly + 0.1, 0.29), (0.08, 0.08))


FITS: dict[str, Callable[[float, float, float], Fit]] = {
    "boat": _boat,
    "boot": _boot,
    "car": _car,
    "cat": _cat,
    "fish": _fish,
    "lamp": _lamp,
    "mug": _mug,
    "robot": _robot,
    "rocket": _rocket,
    "teapot": _teapot,
    "umbrella": _umbrella,
    "vase": _vase,
}

# -- accessories: parts from back to front; the role "worn" is in the accessory's colour ------------------------------

RIM = 0.06  # of the dark outline, in object units: a red hat stays a hat on a red mug


def _outlined(*parts: Points) -> Iterator[Part]:
    for points in parts:
        middle = (points.max(0) + points.min(0)) / 2
        reach = (points.max(0) - points.min(0)) / 2
        yield "dark", middle + (points - middle) * (1 + RIM / reach)
    for points in parts:
        yield "worn", points


def _hat(fit: Fit) -> Iterator[Part]:
    x, y = fit.top
    crown = polygon((x - 0.28, y), (x - 0.24, y - 0.42), (x + 0.24, y - 0.42), (x + 0.28, y))
    yield from _outlined(crown, ellipse(x, y + 0.02, 0.5, 0.11))


def _scarf(fit: Fit) -> Iterator[Part]:
    x, y, half = fit.neck
    left = x + 0.6 * half
    tail = polygon((left - 0.12, y), (left + 0.1, y), (left + 0.16, y + 0.36), (left - 0.08, y + 0.36))
    yield from _outlined(tail, ellipse(x, y, half, 0.14))


def _glasses(fit: Fit) -> Iterator[Part]:
    x, y = fit.face
    yield from _outlined(
        box(x - 0.15, y - 0.05, x + 0.15, y + 0.05), *(ellipse(x + s, y, 0.23, 0.23) for s in (-0.26, 0.26))
    )
    for s in (-0.26, 0.26):
        yield "dark", ellipse(x + s, y, 0.1, 0.1)


def _bow(fit: Fit) -> Iterator[Part]:
    x, y, _ = fit.neck
    wings = [polygon((x, y), (x + s * 0.42, y - 0.24), (x + s * 0.42, y + 0.24)) for s in (-1.0, 1.0)]
    yield from _outlined(*wings)
    yield "dark", ellipse(x, y, 0.1, 0.13)


ACCESSORIES: dict[str, Callable[[Fit], Iterator[Part]]] = {
    "hat": _hat,
    "scarf": _scarf,
    "glasses": _glasses,
    "bow": _bow,
}
