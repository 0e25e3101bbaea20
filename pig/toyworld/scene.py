"""The toy world: drawn individuals before drawn backgrounds, with accessories, partial pictures, and exact masks.

A *subject* is a category plus everything that makes one mug differ from the next: shape parameters, two colours, a
pattern, and an emblem in a third colour at a place of its own. Captions speak of category, background, accessory and
sometimes the main colour, never of the rest, so a model can only learn the rest from a reference picture.

A picture may show the subject with an accessory (its mask leaves that out), cut by the frame's edge, or behind
something in the foreground (its mask then covers the visible part only).

Everything follows from integers: `make_subject(seed)` and `draw(subject, background, seed)` give the same pixels
everywhere. Shapes are polygons; they are filled at `SUPERSAMPLING` times the size and box-filtered down, so that edges
are antialiased and the mask's value is the covered fraction of each pixel.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw

from pig.toyworld.backgrounds import SCENERY
from pig.toyworld.details import ACCESSORIES as ACCESSORY_PARTS
from pig.toyworld.details import EMBLEMS, FITS, PATTERNS, Fit, pattern_of
from pig.toyworld.shapes import OBJECTS, Brush, Colour, Points, box, polygon

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
CONTRAST = 110.0  # least distance, in RGB of [0, 255], of an emblem's colour from both colours it lies on
CATEGORIES = tuple(OBJECTS)

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
# Prompt phrase of each accessory, for its colour.
ACCESSORIES: dict[str, str] = {
    "hat": "wearing a {} hat",
    "scarf": "wearing a {} scarf",
    "glasses": "wearing {} glasses",
    "bow": "wearing a {} bow",
}
ACCESSORY_COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
ACCESSORY_SHARE = 0.4  # of training pictures
HIDDEN = (0.2, 0.45)  # share of the object that a partial picture does not show

View = Literal["whole", "cut", "behind"]


@dataclass(frozen=True)
class Subject:
    """One individual: what stays the same whatever the scene, the pose and the accessory."""

    category: str
    shape: tuple[float, float, float]  # three free shape parameters, each in [0, 1]
    colour: str  # name of the main colour, a key of PALETTE
    primary: Colour
    secondary: Colour
    pattern: str
    emblem: str  # a key of EMBLEMS
    emblem_colour: Colour
    emblem_place: tuple[float, float]  # within its room on the object, each in [-1, 1]


@dataclass(frozen=True)
class Worn:
    """An accessory in one of ACCESSORY_COLOURS."""

    accessory: str
    colour: str

    def phrase(self) -> str:
        """wearing a red hat"""
        return ACCESSORIES[self.accessory].format(self.colour)


@dataclass(frozen=True)
class Drawing:
    """A picture and where in it the object is.

    image: (H, W, 3) uint8 RGB. mask: (H, W) uint8, the share of the pixel that shows the object, times 255; worn: the
    same of what the object wears.
    """

    image: np.ndarray
    mask: np.ndarray
    worn: np.ndarray

    def reference(self) -> np.ndarray:
        """The object cut out of the image: (H, W, 4) uint8, straight alpha."""
        return np.dstack([self.image, self.mask])


def make_subject(seed: int, category: str | None = None) -> Subject:
    """The subject of this seed. `category` fixes the kind and leaves the rest of the identity as the seed has it."""
    rng = np.random.default_rng([seed, 0])
    drawn = str(rng.choice(CATEGORIES))
    names = [str(name) for name in rng.permutation(list(PALETTE))]
    a, b, c = rng.random(3)
    primary, secondary = (_jittered(name, rng) for name in names[:2])
    emblem_colour = next(
        colour
        for colour in (_jittered(name, rng) for name in names[2:])
        if min(np.linalg.norm(np.subtract(colour, other)) for other in (primary, secondary)) >= CONTRAST
    )
    x, y = rng.uniform(-1, 1, 2)
    return Subject(
        category=category or drawn,
        shape=(float(a), float(b), float(c)),
        colour=names[0],
        primary=primary,
        secondary=secondary,
        pattern=str(rng.choice(PATTERNS)),
        emblem=str(rng.choice(list(EMBLEMS))),
        emblem_colour=emblem_colour,
        emblem_place=(float(x), float(y)),
    )


def held_out_subject(number: int) -> Subject:
    """A subject that no training picture shows; the categories take turns."""
    return make_subject(HELD_OUT_SEED + number, CATEGORIES[number % len(CATEGORIES)])


def held_out_background(category: str) -> str:
    """The background that no training picture shows with this category: what held-out prompts ask for."""
    names = list(BACKGROUNDS)
    return names[(CATEGORIES.index(category) + 3) % len(names)]


def held_out_accessory(category: str) -> str:
    """The accessory that no training picture shows on this category."""
    names = list(ACCESSORIES)
    return names[CATEGORIES.index(category) % len(names)]


def training_background(category: str, number: int) -> str:
    """Any other background, by number."""
    names = [name for name in BACKGROUNDS if name != held_out_background(category)]
    return names[number % len(names)]


def training_accessory(category: str, seed: int, share: float = ACCESSORY_SHARE) -> Worn | None:
    """What a training picture of this seed shows on its object, in a `share` of them: never the held-out accessory."""
    rng = np.random.default_rng([seed, 2])
    if rng.random() >= share:
        return None
    names = [name for name in ACCESSORIES if name != held_out_accessory(category)]
    return Worn(str(rng.choice(names)), str(rng.choice(ACCESSORY_COLOURS)))


def training_setting(seed: int) -> tuple[Subject, str, Worn | None]:
    """Subject, background and accessory of a training picture: no combination that is held out."""
    subject = make_subject(seed)
    return subject, training_background(subject.category, seed), training_accessory(subject.category, seed)


def partial_view(seed: int, share: float) -> View:
    """How a picture of this seed shows its object: whole, but in a `share` of them."""
    rng = np.random.default_rng([seed, 3])
    if rng.random() >= share:
        return "whole"
    return "cut" if rng.random() < 0.5 else "behind"


def object_phrase(subject: Subject, with_colour: bool = False) -> str:
    return f"{subject.colour} {subject.category}" if with_colour else subject.category


def caption(object_: str, background: str | None = None, worn: Worn | None = None) -> str:
    """The paper's form (arXiv 2401.13974, section 3.4): "A photo of a [object], [scene]", and what it wears."""
    text = f"a photo of a {object_}"
    if worn is not None:
        text += f" {worn.phrase()}"
    return text if background is None else f"{text}, {BACKGROUNDS[background]}"


def draw(
    subject: Subject, background: str, seed: int, size: int = 64, *, worn: Worn | None = None, view: View = "whole"
) -> Drawing:
    """Draw the subject before a background. `seed` fixes pose and scenery, at any `size` in pixels."""
    rng = np.random.default_rng([seed, 1])
    angle = rng.uniform(-0.35, 0.35)
    flip = -1.0 if rng.random() < 0.5 else 1.0
    scale = rng.uniform(0.6, 0.84)
    own = list(OBJECTS[subject.category](*subject.shape))
    worn_parts = [] if worn is None else list(ACCESSORY_PARTS[worn.accessory](_fit(subject)))

    # object -> frame coordinates: flip, rotate, scale, move.
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([flip, 1.0])
    corners = np.concatenate([points for _, points in (*own, *worn_parts)]) @ turn.T
    low, high = corners.min(0), corners.max(0)
    scale = min(scale, 0.97 * 2 / float((high - low).max()))
    # Anywhere in the frame, whole.
    offset = rng.uniform(-0.97 - scale * low, np.maximum(0.97 - scale * high, -0.97 - scale * low))
    if view == "cut":
        side, axis = rng.choice([-1.0, 1.0]), rng.integers(2)
        beyond = scale * float(high[axis] - low[axis]) * rng.uniform(*HIDDEN)
        offset[axis] = side * (1 + beyond) - scale * float(high[axis] if side > 0 else low[axis])
    matrix = scale * turn

    canvas = Image.new("RGB", (size * SUPERSAMPLING,) * 2)
    brush = Brush(canvas)
    SCENERY[background](brush, rng)
    mask, worn_mask = (Image.new("L", canvas.size) for _ in range(2))

    def place(points: Points) -> list[tuple[float, float]]:
        return brush.pixels(points @ matrix.T + offset)

    coat = Image.new("RGB", canvas.size, subject.primary)
    for points in pattern_of(subject.pattern, 0.3 * (subject.shape[2] - 0.5)):
        ImageDraw.Draw(coat).polygon(place(points), fill=subject.secondary)
    ImageDraw.Draw(coat).polygon(place(_emblem(subject)), fill=subject.emblem_colour)
    fills = {"trim": subject.secondary, "dark": DARK, "light": LIGHT}
    for role, points in own:
        xy = place(points)
        ImageDraw.Draw(mask).polygon(xy, fill=255)
        if role == "body":
            part = Image.new("L", canvas.size)
            ImageDraw.Draw(part).polygon(xy, fill=255)
            canvas.paste(coat, mask=part)
        else:
            ImageDraw.Draw(canvas).polygon(xy, fill=fills[role])
    if worn is not None:
        fills["worn"] = _rgb(*PALETTE[worn.colour])
    for role, points in worn_parts:
        ImageDraw.Draw(mask).polygon(place(points), fill=0)
        ImageDraw.Draw(worn_mask).polygon(place(points), fill=255)
        ImageDraw.Draw(canvas).polygon(place(points), fill=fills[role])
    if view == "behind":
        _cover(canvas, (mask, worn_mask), brush, rng)
    return Drawing(*(np.asarray(one.reduce(SUPERSAMPLING)) for one in (canvas, mask, worn_mask)))


def partial_mask(drawing: Drawing, seed: int) -> Drawing:
    """The same picture, of whose object a part is left out of the mask, as if another picture had been cut there."""
    rng = np.random.default_rng([seed, 4])
    inside = drawing.mask > 0
    axis, share = int(rng.integers(2)), rng.uniform(*HIDDEN)
    rows = np.flatnonzero(inside.any(1 - axis))
    cut = rows[0] + round(share * (rows[-1] + 1 - rows[0]))
    gone = slice(None, cut) if rng.random() < 0.5 else slice(rows[-1] + 1 - (cut - rows[0]), None)
    mask = drawing.mask.copy()
    mask[(gone, slice(None)) if axis == 0 else (slice(None), gone)] = 0
    return replace(drawing, mask=mask)


def _fit(subject: Subject) -> Fit:
    return FITS[subject.category](*subject.shape)


def _emblem(subject: Subject) -> Points:
    fit = _fit(subject)
    x, y, radius = fit.emblem
    return EMBLEMS[subject.emblem] * radius + np.add((x, y), np.multiply(fit.room, subject.emblem_place))


def _cover(canvas: Image.Image, masks: tuple[Image.Image, Image.Image], brush: Brush, rng: Generator) -> None:
    """Put something in front of the object, so that a share of it within HIDDEN is covered. `masks`: of the object, and
    of what it wears."""
    visible = np.asarray(masks[0])
    area = (visible > 0).sum()
    low, high = HIDDEN
    best: tuple[float, list[tuple[Colour, Points]], Image.Image] | None = None
    for _ in range(24):
        parts = _foreground(rng)
        cover = Image.new("L", canvas.size)
        for _, points in parts:
            ImageDraw.Draw(cover).polygon(brush.pixels(points), fill=255)
        share = ((np.asarray(cover) > 0) & (visible > 0)).sum() / area
        miss = max(low - share, share - high, 0.0)
        if best is None or miss < best[0]:
            best = (miss, parts, cover)
        if miss == 0:
            break
    assert best is not None
    _, parts, cover = best
    for colour, points in parts:
        brush.fill(points, colour)
    for mask in masks:
        mask.paste(ImageChops.multiply(mask, ImageChops.invert(cover)))


def _foreground(rng: Generator) -> list[tuple[Colour, Points]]:
    """A plant or a box, from back to front, at the lower or a side edge of the frame."""
    x = rng.uniform(-0.9, 0.9)
    if rng.random() < 0.5:
        base, tall = rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.5)
        green = [_rgb(0.3 + rng.uniform(-0.05, 0.05), 0.7, v) for v in (0.42, 0.55, 0.68)]
        leaves = []
        for i, lean in enumerate(np.linspace(-0.75, 0.75, 6) + rng.uniform(-0.08, 0.08, 6)):
            tip = np.array([x + lean * tall * 0.8, base - tall * (1 - 0.55 * abs(lean))])
            middle, wide = (tip + np.array([x, base])) / 2, 0.16
            side = np.array([base - tip[1], tip[0] - x])
            side *= wide / max(float(np.linalg.norm(side)), 1e-6)
            leaves.append((green[i % 3], polygon((x, base), tuple(middle + side), tuple(tip), tuple(middle - side))))
        return leaves
    wide, top = rng.uniform(0.3, 0.55), rng.uniform(-0.1, 0.6)
    wood = _rgb(0.085 + rng.uniform(-0.02, 0.02), 0.5, rng.uniform(0.55, 0.75))
    edge = tuple(int(0.7 * channel) for channel in wood)
    planks = [(edge, box(x - wide, y, x + wide, y + 0.05)) for y in np.arange(top, 1.1, 0.3)]
    return [(wood, box(x - wide, top, x + wide, 1.2)), *planks]  # type: ignore[list-item]


def _jittered(name: str, rng: Generator) -> Colour:
    hue, saturation, value = PALETTE[name]
    hue = (hue + rng.uniform(-0.02, 0.02)) % 1.0
    saturation = float(np.clip(saturation + rng.uniform(-0.06, 0.06), 0, 1))
    value = float(np.clip(value + rng.uniform(-0.07, 0.05), 0, 1))
    return _rgb(hue, saturation, value)


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * r), round(255 * g), round(255 * b)
