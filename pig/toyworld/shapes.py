"""Polygons: geometry, the objects of the toy world and their patterns. Coordinates: x right, y down."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = np.ndarray  # (N, 2) float, one closed polygon

# -- geometry ---------------------------------------------------------------------------------------------------------


def polygon(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=float)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 1.0) -> Points:
    """Angles in turns, clockwise from the right; a part of the turn gives the segment cut off by its chord."""
    turn = 2 * np.pi * np.linspace(start, stop, 33)
    return np.stack([x + rx * np.cos(turn), y + ry * np.sin(turn)], axis=1)


def arc(x: float, y: float, rx: float, ry: float, width: float, start: float = 0.0, stop: float = 1.0) -> Points:
    """A bent band of the given width, its outer edge on the ellipse."""
    inner = ellipse(x, y, rx - width, ry - width, start, stop)
    return np.concatenate([ellipse(x, y, rx, ry, start, stop), inner[::-1]])


class Brush:
    """Draws in frame coordinates: the picture is [-1, 1] x [-1, 1], y down."""

    def __init__(self, canvas: Image.Image) -> None:
        self.canvas, self.half = canvas, canvas.width / 2

    def pixels(self, points: Points) -> list[tuple[float, float]]:
        return [(x, y) for x, y in (points + 1) * self.half - 0.5]

    def fill(self, points: Points, colour: Colour) -> None:
        ImageDraw.Draw(self.canvas).polygon(self.pixels(points), fill=colour)

    def gradient(self, top: Colour, bottom: Colour, upper: float = -1.0, lower: float = 1.0) -> None:
        """Vertical gradient over the rows from `upper` to `lower`."""
        rows = slice(round((upper + 1) * self.half), round((lower + 1) * self.half))
        height = rows.stop - rows.start
        if height > 0:
            ramp = np.linspace(top, bottom, height).round().astype(np.uint8)[:, None, :]
            self.canvas.paste(Image.fromarray(ramp).resize((self.canvas.width, height)), (0, rows.start))


# -- objects: parts from back to front, (role, polygon); a, b, c are the subject's shape parameters in [0, 1] ----------

Part = tuple[str, Points]


def _mug(a: float, b: float, c: float) -> Iterator[Part]:
    half, top = 0.5 + 0.15 * a, -0.75 + 0.25 * b
    taper = 0.14 * c
    yield "trim", arc(half - 0.03, 0.08, 0.46, 0.26 + 0.24 * (1 - b), 0.17, -0.25, 0.25)
    yield "body", polygon((-half, top), (half, top), (half - taper, 0.85), (-half + taper, 0.85))
    yield "trim", ellipse(0, top, half, 0.13)
    yield "dark", ellipse(0, top, half - 0.1, 0.07)


def _teapot(a: float, b: float, c: float) -> Iterator[Part]:
    tall = 0.48 + 0.14 * a
    yield "trim", arc(0.52, 0.1, 0.46, 0.4, 0.15, -0.27, 0.27)
    yield "body", polygon((-0.35, 0.35), (-0.95, -0.35 - 0.2 * b), (-0.75, -0.45 - 0.2 * b), (-0.25, -0.05))
    yield "body", ellipse(0, 0.2, 0.62, tall)
    yield "trim", ellipse(0, 0.2 - tall + 0.08, 0.34, 0.14)
    yield "dark", ellipse(0, 0.02 - tall, 0.09 + 0.06 * c, 0.1 + 0.04 * c)
    yield "trim", box(-0.36, 0.12 + tall, 0.36, 0.24 + tall)


def _vase(a: float, b: float, c: float) -> Iterator[Part]:
    neck, belly = 0.14 + 0.14 * a, 0.45 + 0.17 * b
    y = np.linspace(-0.95, 0.95, 24)
    swell = np.exp(-(((y - 0.25 + 0.3 * c) / 0.42) ** 2))
    x = neck + (belly - neck) * swell + 0.14 * np.exp(-(((y + 0.95) / 0.12) ** 2))
    yield "body", np.concatenate([np.stack([x, y], 1), np.stack([-x, y], 1)[::-1]])
    yield "trim", ellipse(0, -0.93, neck + 0.15, 0.08)
    yield "trim", box(-neck - 0.1, 0.84, neck + 0.1, 0.97)


def _robot(a: float, b: float, c: float) -> Iterator[Part]:
    head, chest = 0.32 + 0.12 * a, 0.4 + 0.12 * b
    yield "dark", box(-0.04, -1.0, 0.04, -0.7)
    yield "trim", ellipse(0, -0.95, 0.1, 0.1)
    yield "trim", box(-chest - 0.24, -0.1, chest + 0.24, 0.12)
    yield "trim", box(-chest - 0.24, -0.1, -chest - 0.06, 0.5)
    yield "trim", box(chest + 0.06, -0.1, chest + 0.24, 0.5)
    yield "dark", box(-0.3, 0.5, -0.08, 0.98)
    yield "dark", box(0.08, 0.5, 0.3, 0.98)
    yield "body", box(-chest, -0.2, chest, 0.62)
    yield "trim", box(-head, -0.8, head, -0.18 - 0.04 * c)
    yield "light", box(-head + 0.09, -0.62, -0.06, -0.36)
    yield "light", box(0.06, -0.62, head - 0.09, -0.36)


def _car(a: float, b: float, c: float) -> Iterator[Part]:
    roof, nose = -0.5 - 0.15 * a, 0.1 * b
    yield "trim", polygon((-0.62, 0.0), (-0.4 + 0.1 * c, roof), (0.3, roof), (0.58, 0.0))
    yield "light", polygon((-0.44, -0.06), (-0.3 + 0.1 * c, roof + 0.12), (-0.03, roof + 0.12), (-0.03, -0.06))
    yield "light", polygon((0.07, -0.06), (0.07, roof + 0.12), (0.22, roof + 0.12), (0.41, -0.06))
    yield "body", polygon((-0.97, 0.0), (0.72, 0.0), (0.97, 0.12 + nose), (0.97, 0.5), (-0.97, 0.5))
    for x in (-0.55, 0.55):
        yield "dark", ellipse(x, 0.5, 0.25, 0.25)
        yield "light", ellipse(x, 0.5, 0.1, 0.1)


def _boot(a: float, b: float, c: float) -> Iterator[Part]:
    shaft, top = 0.36 + 0.1 * a, -0.92 + 0.3 * b
    yield "body", polygon((-0.6, top), (-0.6 + 2 * shaft, top), (-0.6 + 2 * shaft, 0.1), (-0.6, 0.1))
    yield "body", np.concatenate([polygon((-0.6, 0.72), (-0.6, 0.0)), ellipse(0.42, 0.45, 0.48, 0.42, -0.32, 0.1)])
    yield "body", box(-0.6, 0.0, 0.75, 0.72)
    yield "dark", box(-0.66, 0.7, 0.92, 0.82 + 0.14 * c)
    yield "trim", box(-0.66, top - 0.02, -0.54 + 2 * shaft, top + 0.24)


def _cat(a: float, b: float, c: float) -> Iterator[Part]:
    ear, face = 0.3 + 0.2 * a, 0.58 + 0.08 * b
    yield "trim", arc(0.45, 0.35, 0.5, 0.55, 0.17, -0.2, 0.25)
    yield "body", ellipse(0, 0.6, 0.5 + 0.12 * c, 0.42)
    for s in (-1.0, 1.0):
        yield "trim", polygon((s * face, -0.3), (s * (face - 0.02), -0.62 - ear), (s * 0.12, -0.62))
    yield "body", ellipse(0, -0.2, face, 0.5)
    for s in (-1.0, 1.0):
        yield "light", ellipse(s * 0.25, -0.25, 0.15, 0.15)
        yield "dark", ellipse(s * 0.25, -0.25, 0.07, 0.13)
    yield "dark", polygon((-0.09, -0.02), (0.09, -0.02), (0, 0.1))


def _fish(a: float, b: float, c: float) -> Iterator[Part]:
    tall, tail = 0.42 + 0.16 * a, 0.38 + 0.2 * b
    yield "trim", polygon((0.35, 0.0), (0.98, -tail), (0.86, 0.0), (0.98, tail))
    yield "trim", polygon((-0.3, -tall + 0.1), (0.1 + 0.2 * c, -tall - 0.3), (0.35, -tall + 0.3))
    yield "body", ellipse(-0.2, 0, 0.75, tall)
    yield "light", ellipse(-0.6, -0.1, 0.15, 0.15)
    yield "dark", ellipse(-0.62, -0.1, 0.07, 0.07)


def _lamp(a: float, b: float, c: float) -> Iterator[Part]:
    wide, narrow = 0.65 + 0.15 * a, 0.25 + 0.2 * b
    yield "trim", box(-0.09, 0.0, 0.09, 0.85)
    yield "trim", ellipse(0, 0.3 + 0.2 * c, 0.2, 0.22)
    yield "dark", box(-0.46, 0.8, 0.46, 0.96)
    yield "body", polygon((-narrow, -0.95), (narrow, -0.95), (wide, 0.12), (-wide, 0.12))


def _rocket(a: float, b: float, c: float) -> Iterator[Part]:
    half, fin = 0.28 + 0.1 * a, 0.35 + 0.2 * b
    for s in (-1.0, 1.0):
        yield "trim", polygon((s * (half - 0.06), 0.1), (s * (half + fin), 0.85), (s * (half - 0.06), 0.7))
    yield "dark", polygon((-0.18, 0.7), (0.18, 0.7), (0.24, 0.95), (-0.24, 0.95))
    yield "body", box(-half, -0.45, half, 0.75)
    yield "trim", polygon((-half, -0.42), (0, -1.0), (half, -0.42))
    yield "dark", ellipse(0, -0.1 + 0.2 * c, 0.2, 0.2)
    yield "light", ellipse(0, -0.1 + 0.2 * c, 0.13, 0.13)


def _boat(a: float, b: float, c: float) -> Iterator[Part]:
    mast, hull = 0.1 * a, 0.5 + 0.15 * b
    yield "dark", box(-0.05 + mast, -0.98, 0.05 + mast, 0.4)
    yield "body", polygon((0.1 + mast, -0.95), (0.88, 0.22), (0.1 + mast, 0.22))
    yield "body", polygon((-0.1 + mast, -0.75 + 0.2 * c), (-0.75, 0.22), (-0.1 + mast, 0.22))
    yield "trim", polygon((-0.97, 0.36), (0.97, 0.36), (hull, 0.88), (-hull, 0.88))


def _umbrella(a: float, b: float, c: float) -> Iterator[Part]:
    tall = 0.75 + 0.17 * a
    yield "dark", box(-0.06, -0.1, 0.06, 0.7)
    yield "dark", arc(0.2, 0.68, 0.26, 0.26, 0.12, 0.0, 0.5)
    dome = ellipse(0, 0.0, 0.95, tall, 0.5, 1.0)
    scallops = [ellipse(x, 0.0, 0.3166, 0.06 + 0.12 * b, 1.0, 0.5) for x in (0.6333, 0.0, -0.6333)]
    yield "body", np.concatenate([dome, *scallops])
    yield "trim", ellipse(0, -tall, 0.1 + 0.06 * c, 0.1)


OBJECTS: dict[str, Callable[[float, float, float], Iterator[Part]]] = {
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
