"""Commands run in this process, and photographs for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from data_gen.__main__ import run as data_gen
from pig import cli

TOY = "configs/bootpig/toyworld.yaml"


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command line says; it must end with code 2."""
    monkeypatch.setattr(sys, "argv", ["pig.cli", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def photographs(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        picture = Image.new("RGBA", (20, 20), (10 * number, 90, 30, 255))
        picture.putpixel((0, 0), (0, 0, 0, 0))
        picture.save(folder / f"{number}.png")
    return folder


def data_gen_photos(photos: Path, out: Path) -> None:
    sys.argv = ["data_gen", "photos", f"--photos={photos}", f"--out={out}", "--object=mug", "--size=16"]
    data_gen(sys.argv[1:])
