"""A full disk under every command that writes: it is said, nothing half-written is taken for whole, and once there is
room the same command ends with what an undisturbed one makes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import data_gen.__main__ as data_gen
from pig import cli
from pig.toyworld import scene


class Disk:
    """A file system of its own, whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system of its own: {done.stderr.decode().strip()}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, toy_data) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        drawing = scene.draw(scene.make_subject(scene.HELD_OUT_SEED, "mug"), "sea", number, 96)
        Image.fromarray(drawing.reference()).save(folder / f"{number}.png")
    cli.run(["generate", *of_pictures(folder), "--images_per_prompt=3", f"--out={folder / 'drawn'}"])
    return folder


def of_pictures(folder: Path) -> list[str]:
    return ["--references", str(folder / "0.png"), "--prompt", "a mug", "a photo of a mug", "--steps=1"]


def contents(folder: Path) -> dict[str, str]:
    """Of all files but logs of when something was done."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".html", ".json", ".jsonl")
    }


# Command -> program, words for a folder of pictures and one of toy data, and kilobytes that are too few.
COMMANDS: dict[str, tuple[Callable[[], None], Callable[[Path, Path], list[str]], int]] = {
    "triplets": (data_gen.main, lambda *_: ["triplets", "--count=60"], 100),
    "subjects": (data_gen.main, lambda *_: ["subjects", "--count=4"], 60),
    "photos": (data_gen.main, lambda own, _: ["photos", f"--photos={own}", "--object=mug", "--size=96"], 40),
    "encode": (
        data_gen.main,
        lambda _, toy: ["encode", str(toy / "triplets"), "--base=toyworld", "--resolution=64"],
        200,
    ),
    "inspect": (data_gen.main, lambda _, toy: ["inspect", str(toy / "triplets")], 40),
    "generate": (cli.main, lambda own, _: ["generate", *of_pictures(own), "--images_per_prompt=3"], 24),
    "export": (cli.main, lambda *_: ["export", "--model=toyworld"], 9000),
    "evaluate": (
        cli.main,
        lambda own, _: ["evaluate", f"--images={own / 'drawn'}", "--references", str(own / "0.png")],
        24,
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk(disk, pictures, toy_data, tmp_path, monkeypatch, capsys, command) -> None:
    program, words, few = COMMANDS[command]
    told = words(pictures, toy_data)

    def run(out: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["pig", *told, f"--out={out}"])
        try:
            program()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    disk.resize(few)
    assert run(disk.folder / "out") == 1
    assert "error: the disk is full" in capsys.readouterr().err
    disk.resize(200_000)
    assert run(disk.folder / "out") == 0
    assert run(tmp_path / "undisturbed") == 0
    assert contents(disk.folder / "out") == contents(tmp_path / "undisturbed")
    assert contents(disk.folder / "out") or command == "evaluate"
    shutil.rmtree(disk.folder / "out")
    left = [path.name for path in disk.folder.rglob("*") if path.is_file()]
    assert not left, f"left beside the output: {left}"
