"""The toy world: drawn objects with an identity of their own, before drawn backgrounds, with exact masks.

A *subject* is a category plus everything that makes one mug differ from the next: shape parameters, two colours and a
pattern. Captions speak of category and background, never of that identity (a colour word may be asked for), so a
model can only learn it from a reference image, which is what personalised generation is about.

Everything follows from integers: `make_subject(seed)` and `draw(subject, background, seed)` give the same pixels
everywhere. Shapes are polygons in object coordinates (x right, y down, the object within about [-1, 1]); they are
filled at `SUPERSAMPLING` times the size and box-filtered down, so that edges are antialiased and the mask's value is
the covered fraction of each pixel.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Points = np.ndarray  # (N, 2) float, one closed polygon

SUPERSAMPLING = 4
# Held-out subjects live above this seed, training subjects below it: no seed is ever both.
HELD_OUT_SEED = 1_000_000_000

DARK: Colour = (45, 45, 52)
LIGHT: Colour = (240, 240, 236)

# Hue, saturation, value; each subject's own colour is jittered around these.
PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 0.85, 0.85),
    "orange": (0.08, 0.90, 0.95),
    "yellow": (0.14, 0.80, 0.97),
    "green": (0.33, 0.75, 0.62),
    "cyan": (0.49, 0.65, 0.85),
    "blue": (0.61, 0.80, 0.85),
    "purple": (0.76, 0.65, 0.65),
    "pink": (0.92, 0.45, 0.97),
    "brown": (0.06, 0.65, 0.45),
    "white": (0.10, 0.04, 0.95),
    "gray": (0.60, 0.06, 0.55),
    "black": (0.65, 0.15, 0.18),
}
PATTERNS = ("plain", "half", "band", "stripes", "bars", "checks", "dots")

# Prompt phrase of each background; the keys name the drawing functions below.
BACKGROUNDS: dict[str, str] = {
    "beach": "on a beach",
    "forest": "in a forest",
    "snow": "in the snow",
    "desert": "in the desert",
    "street": "on a city street",
    "kitchen": "in a kitchen",
    "meadow": "in a meadow",
    "sea": "under water",
    "space": "in space",
    "sunset": "at sunset",
}


@dataclass(frozen=True)
class Subject:
    """One individual: what stays the same whatever the scene and the pose."""

    category: str
    shape: tuple[float, float, float]  # three free shape parameters, each in [0, 1]
    colour: str  # name of the main colour, a key of PALETTE
    primary: Colour
    secondary: Colour
    pattern: str


@dataclass(frozen=True)
class Drawing:
    """`image`: (H, W, 3) uint8 RGB. `mask`: (H, W) uint8, covered fraction of the pixel times 255."""

    image: np.ndarray
    mask: np.ndarray

    def reference(self) -> np.ndarray:
        """The object cut out of the image: (H, W, 4) uint8, straight alpha."""
        return np.dstack([self.image, self.mask])


def make_subject(seed: int, category: str | None = None) -> Subject:
    """The subject of this seed. `category` fixes the kind and leaves the rest of the identity as the seed has it."""
    rng = np.random.default_rng([seed, 0])
    drawn = str(rng.choice(CATEGORIES))
    colour, other = (str(name) for name in rng.choice(list(PALETTE), 2, replace=False))
    a, b, c = rng.random(3)
    return Subject(
        category=category or drawn,
        shape=(float(a), float(b), float(c)),
        colour=colour,
        primary=_jittered(colour, rng),
        secondary=_jittered(other, rng),
        pattern=str(rng.choice(PATTERNS)),
    )


def held_out_background(category: str) -> str:
    """The background that no training picture shows with this category: what held-out prompts ask for."""
    names = list(BACKGROUNDS)
    return names[(CATEGORIES.index(category) + 3) % len(names)]


def training_background(category: str, number: int) -> str:
    """Any other background, by number."""
    names = [name for name in BACKGROUNDS if name != held_out_background(category)]
    return names[number % len(names)]


def object_phrase(subject: Subject, with_colour: bool = False) -> str:
    return f"{subject.colour} {subject.category}" if with_colour else subject.category


def caption(object_: str, background: str) -> str:
    """The paper's form (arXiv 2401.13974, section 3.4): "A photo of a [object], [scene]"."""
    return f"a photo of a {object_}, {BACKGROUNDS[background]}"


def draw(subject: Subject, background: str, seed: int, size: int = 64) -> Drawing:
    """Draw the subject before a background. `seed` fixes pose and scenery, at any `size` in pixels."""
    rng = np.random.default_rng([seed, 1])
    scale = rng.uniform(0.66, 0.80)
    angle = rng.uniform(-0.22, 0.22)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    room = 1.0 - 1.05 * scale
    offset = rng.uniform(-room, room, 2)

    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    brush = Brush(canvas)
    _SCENERY[background](brush, rng)
    mask = Image.new("L", canvas.size)

    cos, sin = np.cos(angle), np.sin(angle)
    # object -> frame coordinates: flip, rotate, scale, move.
    matrix = scale * np.array([[cos, -sin], [sin, cos]]) @ np.diag([flip, 1.0])

    def place(points: Points) -> list[tuple[float, float]]:
        return brush.pixels(points @ matrix.T + offset)

    coat = Image.new("RGB", canvas.size, subject.primary)
    for points in _pattern(subject):
        ImageDraw.Draw(coat).polygon(place(points), fill=subject.secondary)
    for role, points in _OBJECTS[subject.category](*subject.shape):
        xy = place(points)
        ImageDraw.Draw(mask).polygon(xy, fill=255)
        if role == "body":
            part = Image.new("L", canvas.size)
            ImageDraw.Draw(part).polygon(xy, fill=255)
            canvas.paste(coat, mask=part)
        else:
            fill = {"trim": subject.secondary, "dark": DARK, "light": LIGHT}[role]
            ImageDraw.Draw(canvas).polygon(xy, fill=fill)
    return Drawing(np.asarray(canvas.reduce(SUPERSAMPLING)), np.asarray(mask.reduce(SUPERSAMPLING)))


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


def _jittered(name: str, rng: Generator) -> Colour:
    hue, saturation, value = PALETTE[name]
    hue = (hue + rng.uniform(-0.02, 0.02)) % 1.0
    saturation = float(np.clip(saturation + rng.uniform(-0.06, 0.06), 0, 1))
    value = float(np.clip(value + rng.uniform(-0.07, 0.05), 0, 1))
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)


def _shade(colour: Colour, rng: Generator, amount: int = 14) -> Colour:
    r, g, b = np.clip(np.array(colour) + rng.integers(-amount, amount + 1, 3), 0, 255).tolist()
    return r, g, b


# -- patterns: features of at least 0.36 object units, which is 8 pixels of a 64-pixel picture ------------------------


def _pattern(subject: Subject) -> Iterator[Points]:
    """The places of the secondary colour, in object coordinates."""
    grid = np.arange(-1.5, 1.6, 0.42)
    shift = 0.3 * (subject.shape[2] - 0.5)
    match subject.pattern:
        case "half":
            yield box(-2, 0.12 + shift, 2, 2)
        case "band":
            yield box(-2, -0.22 + shift, 2, 0.24 + shift)
        case "stripes":
            for y in grid[::2]:
                yield box(-2, y + shift, 2, y + 0.42 + shift)
        case "bars":
            for x in grid[::2]:
                yield box(x + shift, -2, x + 0.42 + shift, 2)
        case "checks":
            for i, x in enumerate(grid):
                for y in grid[i % 2 :: 2]:
                    yield box(x + shift, y, x + shift + 0.42, y + 0.42)
        case "dots":
            for i, x in enumerate(np.arange(-1.5, 1.6, 0.5)):
                for y in np.arange(-1.5 + 0.3 * (i % 2), 1.6, 0.6):
                    yield ellipse(x + shift, y, 0.19, 0.19)


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


_OBJECTS: dict[str, Callable[[float, float, float], Iterator[Part]]] = {
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
CATEGORIES = tuple(_OBJECTS)
LIVE_CATEGORIES = ("cat", "fish")


# -- backgrounds ------------------------------------------------------------------------------------------------------


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


_SCENERY: dict[str, Callable[[Brush, Generator], None]] = {
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
