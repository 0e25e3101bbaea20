"""A short chain of data generation on the toy world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_gen.config import DatagenConfig, load_config
from data_gen.run import generate

CONFIG = Path("configs/datagen/toyworld.yaml")


def config_for(out: Path, *overrides: str) -> DatagenConfig:
    """The toy world's chain, short."""
    short = ["captions.count=9", "shards.size=3", "images.steps=3", "shards.attempts=2", "workers=1"]
    return load_config(CONFIG, [f"output={out}", *short, *overrides])


def digests(out: Path) -> dict[str, str]:
    return {path.name: json.loads(path.read_text())["sha256"] for path in sorted(out.glob("train-*_stats.json"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of an undisturbed run by one worker."""
    out = tmp_path_factory.mktemp("made")
    generate(config_for(out))
    return out
