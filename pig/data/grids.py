"""Pictures side by side."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pig.data.transforms import WHITE


def grid(rows: Sequence[Sequence[Image.Image]], size: int, gap: int = 4) -> Image.Image:
    """Pictures in rows and columns, each scaled to `size` pixels, on white."""
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, len(rows) * (size + gap) + gap), WHITE)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            place = (gap + x * (size + gap), gap + y * (size + gap))
            sheet.paste(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), place)
    return sheet


def labelled_grid(
    columns: Sequence[str],
    rows: Sequence[tuple[str | Sequence[str], Sequence[Image.Image]]],
    size: int = 128,
) -> Image.Image:
    """A grid with a heading over each column and a line of text below each row, or several, evenly spread."""
    font = ImageFont.load_default(13)
    body = grid([pictures for _, pictures in rows], size, gap=22)
    sheet = Image.new("RGB", (body.width, body.height + 20), WHITE)
    sheet.paste(body, (0, 20))
    draw = ImageDraw.Draw(sheet)
    for i, heading in enumerate(columns):
        draw.text((22 + i * (size + 22), 18), heading, fill=(60, 60, 60), font=font)
    for i, (label, pictures) in enumerate(rows):
        labels = [label] if isinstance(label, str) else label
        for j, text in enumerate(labels):
            left = j * len(pictures) // len(labels)
            place = (22 + left * (size + 22), 20 + (i + 1) * (size + 22) + 2)
            draw.text(place, text, fill=(60, 60, 60), font=font)
    return sheet
