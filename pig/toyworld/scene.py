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
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from pig.toyworld.backgrounds import SCENERY
from pig.toyworld.shapes import OBJECTS, Brush, Colour, Points, pattern_of

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
CATEGORIES = tuple(OBJECTS)
PATTERNS = ("plain", "half", "band", "stripes", "bars", "checks", "dots")

# Prompt phrase of each background; the keys name the functions of `backgrounds`.
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


def held_out_subject(number: int) -> Subject:
    """A subject that no training picture shows; the categories take turns."""
    return make_subject(HELD_OUT_SEED + number, CATEGORIES[number % len(CATEGORIES)])


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
    SCENERY[background](brush, rng)
    mask = Image.new("L", canvas.size)

    cos, sin = np.cos(angle), np.sin(angle)
    # object -> frame coordinates: flip, rotate, scale, move.
    matrix = scale * np.array([[cos, -sin], [sin, cos]]) @ np.diag([flip, 1.0])

    def place(points: Points) -> list[tuple[float, float]]:
        return brush.pixels(points @ matrix.T + offset)

    coat = Image.new("RGB", canvas.size, subject.primary)
    for points in pattern_of(subject.pattern, 0.3 * (subject.shape[2] - 0.5)):
        ImageDraw.Draw(coat).polygon(place(points), fill=subject.secondary)
    for role, points in OBJECTS[subject.category](*subject.shape):
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


def _jittered(name: str, rng: Generator) -> Colour:
    hue, saturation, value = PALETTE[name]
    hue = (hue + rng.uniform(-0.02, 0.02)) % 1.0
    saturation = float(np.clip(saturation + rng.uniform(-0.06, 0.06), 0, 1))
    value = float(np.clip(value + rng.uniform(-0.07, 0.05), 0, 1))
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)
