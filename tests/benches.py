"""A small benchmark with generated images, and what scores it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_networks import save_benchmark

from pig import cli
from pig.errors import InputError
from pig.models.encoders import ClipEncoder, DinoEncoder
from pig.models.names import WEIGHTS


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return ClipEncoder(WEIGHTS / "clip")


@pytest.fixture(scope="module")
def dino() -> DinoEncoder:
    return DinoEncoder(WEIGHTS / "dino")


@pytest.fixture
def bench(tmp_path) -> Path:
    save_benchmark(tmp_path)
    return tmp_path


def evaluate(bench: Path, *more: str, out: str = "out") -> dict:
    cli.run(
        ["evaluate", f"--images={bench / 'images'}", f"--subjects={bench / 'subjects'}", f"--out={bench / out}", *more]
    )
    return json.loads((bench / out / "results.json").read_text())


def refused(bench: Path, match: str, *more: str) -> None:
    with pytest.raises(InputError, match=match):
        evaluate(bench, *more)
