"""The scenery of the toy world: one drawing function per background."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from pig.toyworld.shapes import Brush, Colour, box, ellipse, polygon


def _shade(colour: Colour, rng: Generator, amount: int = 14) -> Colour:
    r, g, b = np.clip(np.array(colour) + rng.integers(-amount, amount + 1, 3), 0, 255).tolist()
    return r, g, b


def _beach(brush: Brush, rng: Generator) -> None:
    horizon, shore = rng.uniform(-0.45, -0.2), rng.uniform(0.05, 0.3)
    brush.gradient(_shade((120, 190, 235), rng), (205, 232, 245), -1, horizon)
    brush.gradient(_shade((40, 120, 185), rng), _shade((80, 180, 205), rng), horizon, shore)
    brush.gradient(_shade((240, 220, 165), rng), _shade((215, 185, 125), rng), shore, 1)
    brush.fill(ellipse(rng.uniform(-0.8, 0.8), -0.75, 0.16, 0.16), (255, 240, 170))


def _forest(brush: Brush, rng: Generator) -> None:
    floor = rng.uniform(0.3, 0.55)
    brush.gradient(_shade((60, 110, 75), rng), _shade((35, 75, 50), rng), -1, floor)
    brush.gradient(_shade((85, 75, 45), rng), _shade((60, 50, 32), rng), floor, 1)
    for x in np.arange(-0.9, 1.0, 0.45) + rng.uniform(-0.12, 0.12, 5):
        brush.fill(box(x - 0.06, 0.0, x + 0.06, floor + 0.08), (70, 48, 32))
        tip, green = rng.uniform(-0.98, -0.7), _shade((30, 95, 50), rng, 20)
        brush.fill(polygon((x, tip), (x + 0.3, floor - 0.1), (x - 0.3, floor - 0.1)), green)


def _snow(brush: Brush, rng: Generator) -> None:
    horizon = rng.uniform(-0.2, 0.2)
    brush.gradient(_shade((165, 185, 210), rng), _shade((205, 215, 230), rng), -1, horizon + 0.2)
    brush.fill(ellipse(rng.uniform(-0.9, 0.9), horizon + 0.35, 0.9, 0.5), (222, 230, 242))
    brush.gradient((238, 242, 250), _shade((222, 230, 242), rng, 8), horizon + 0.2, 1)
    for x, y in rng.uniform(-0.95, 0.95, (10, 2)):
        brush.fill(ellipse(x, y, 0.045, 0.045), (255, 255, 255))


def _desert(brush: Brush, rng: Generator) -> None:
    horizon = rng.uniform(-0.15, 0.2)
    brush.gradient(_shade((110, 170, 225), rng), (235, 225, 195), -1, horizon + 0.3)
    brush.fill(ellipse(rng.uniform(-0.8, 0.8), horizon + 0.4, 0.9, 0.45), _shade((205, 130, 65), rng))
    brush.gradient(_shade((225, 150, 75), rng), _shade((185, 105, 50), rng), horizon + 0.3, 1)
    x = rng.choice([-1, 1]) * rng.uniform(0.65, 0.85)
    for part in (
        box(x - 0.06, horizon - 0.3, x + 0.06, 0.6),
        box(x - 0.22, 0.1, x + 0.2, 0.2),
        box(x - 0.22, -0.1, x - 0.13, 0.2),
    ):
        brush.fill(part, (60, 125, 70))


def _street(brush: Brush, rng: Generator) -> None:
    road = rng.uniform(0.35, 0.55)
    brush.gradient(_shade((175, 195, 215), rng), (205, 215, 225), -1, road)
    for x in np.arange(-1.0, 1.0, 0.5):
        top, wall = rng.uniform(-0.95, -0.35), _shade((125, 118, 125), rng, 28)
        brush.fill(box(x, top, x + 0.47, road), wall)
        for wx in (x + 0.08, x + 0.28):
            for wy in np.arange(top + 0.12, road - 0.15, 0.32):
                brush.fill(box(wx, wy, wx + 0.12, wy + 0.17), (245, 225, 150))
    brush.gradient(_shade((75, 75, 82), rng), (60, 60, 66), road, 1)
    for x in np.arange(-1.0, 1.1, 0.6) + rng.uniform(0, 0.3):
        brush.fill(box(x, road + 0.22, x + 0.3, road + 0.29), (235, 235, 225))


def _kitchen(brush: Brush, rng: Generator) -> None:
    counter = rng.uniform(0.3, 0.5)
    tile = _shade((205, 225, 215), rng, 18)
    brush.gradient(tile, tile, -1, counter)
    for at in np.arange(-1.0, 1.1, 0.5) + rng.uniform(0, 0.3):
        brush.fill(box(at, -1, at + 0.06, counter), (245, 248, 245))
        brush.fill(box(-1, at - 0.3, 1, at - 0.24), (245, 248, 245))
    brush.gradient(_shade((165, 115, 70), rng), _shade((130, 85, 50), rng), counter, 1)
    brush.gradient((225, 205, 175), (205, 180, 145), counter, counter + 0.1)


def _meadow(brush: Brush, rng: Generator) -> None:
    horizon = rng.uniform(-0.3, 0.0)
    brush.gradient(_shade((130, 195, 240), rng), (215, 236, 246), -1, horizon)
    brush.gradient(_shade((125, 190, 80), rng), _shade((80, 150, 55), rng), horizon, 1)
    colours = ((240, 225, 90), (245, 245, 245), (235, 120, 150))
    for x, y in rng.uniform((-0.95, horizon + 0.15), (0.95, 0.95), (12, 2)):
        brush.fill(ellipse(x, y, 0.065, 0.065), colours[rng.integers(3)])


def _sea(brush: Brush, rng: Generator) -> None:
    brush.gradient(_shade((60, 165, 200), rng), _shade((12, 50, 105), rng))
    for x in rng.uniform(-0.9, 0.9, 3):
        brush.fill(
            polygon((x - 0.05, -1), (x + 0.12, -1), (x + 0.3, 0.0), (x + 0.1, 0.0)), _shade((95, 190, 215), rng, 8)
        )
    for x in np.arange(-0.9, 1.0, 0.36) + rng.uniform(-0.12, 0.12, 6):
        tip = rng.uniform(0.35, 0.75)
        brush.fill(polygon((x - 0.09, 1), (x + rng.uniform(-0.15, 0.15), tip), (x + 0.09, 1)), (25, 120, 90))
    for x, y in rng.uniform(-0.9, 0.7, (5, 2)):
        brush.fill(ellipse(x, y, 0.06, 0.06), (165, 225, 240))


def _space(brush: Brush, rng: Generator) -> None:
    brush.gradient(_shade((14, 12, 34), rng, 8), _shade((34, 24, 66), rng, 10))
    for x, y in rng.uniform(-0.95, 0.95, (11, 2)):
        brush.fill(ellipse(x, y, 0.05, 0.05), (240, 240, 215))
    x, y = rng.choice([-0.7, 0.7]), rng.choice([-0.7, 0.7])
    brush.fill(ellipse(x, y, 0.25, 0.25), _shade((200, 140, 90), rng, 40))


def _sunset(brush: Brush, rng: Generator) -> None:
    horizon = rng.uniform(0.3, 0.5)
    brush.gradient(_shade((95, 50, 120), rng), _shade((250, 150, 75), rng), -1, horizon)
    brush.fill(ellipse(rng.uniform(-0.7, 0.7), horizon - 0.05, 0.3, 0.3), (255, 225, 120))
    brush.gradient(_shade((62, 38, 60), rng), (40, 26, 44), horizon, 1)
    brush.fill(ellipse(rng.uniform(-0.9, 0.9), horizon + 0.1, 0.6, 0.25), (58, 36, 58))


SCENERY: dict[str, Callable[[Brush, Generator], None]] = {
    "beach": _beach,
    "forest": _forest,
    "snow": _snow,
    "desert": _desert,
    "street": _street,
    "kitchen": _kitchen,
    "meadow": _meadow,
    "sea": _sea,
    "space": _space,
    "sunset": _sunset,
}
