"""`attention`: the word maps of any method as a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from trying import refused

from pig import cli
from pig.commands.attention import words_of
from pig.models.backbone import load_backbone

EMBEDDED = ("ezigen", "instantbooth", "ip_adapter")
PROMPT = "a photo of a mug, on a beach"


def words(out: Path, toy_data: Path, model: str, *more: str) -> list[str]:
    references = ["--references", str(toy_data / "subjects/mug_006/00.png")]
    given = [*references, "--class_noun", "mug", "--prompt", PROMPT, "--num_inference_steps", "2"]
    return ["attention", "--model", model, "--out", str(out), *given, *more]


@pytest.mark.parametrize(
    "model", ["base:toyworld", "toyworld", "toyworld/ezigen", "toyworld/instantbooth", "toyworld/ip_adapter"]
)
def test_any_method(toy_data, tmp_path, monkeypatch, capsys, model) -> None:
    out = tmp_path / "maps.png"
    monkeypatch.setattr(sys, "argv", ["pig.cli", *words(out, toy_data, model)])
    cli.main()
    assert str(out) in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > 600  # six in a row
        assert len(picture.convert("RGB").getcolors(2**24)) > 1000


def test_words_with_their_places() -> None:
    tokenizer = load_backbone("toyworld").tokenizer
    assert [word for word, _ in words_of(tokenizer, PROMPT)] == [
        "a",
        "photo",
        "of",
        "a",
        "mug",
        ",",
        "on",
        "a",
        "beach",
    ]
    found = words_of(tokenizer, "a zwx mug")  # which is three tokens of the toy's
    assert found == [("a", [1]), ("zwx", [2, 3, 4]), ("mug", [5])]


def test_bad_input(toy_data, tmp_path, monkeypatch, capsys) -> None:
    given = words(tmp_path / "maps.png", toy_data, "toyworld")
    for changed, message in (
        (words(tmp_path / "maps", toy_data, "toyworld"), "give a file such as maps.png"),
        ([*given, "--prompt", "a mug", "a cat"], "one --prompt of one subject"),
        (words(tmp_path / "maps.png", toy_data, "toyworld/instantbooth", "--identifier", "zwx"), "'zwx' is 3 tokens"),
    ):
        assert message in refused(monkeypatch, capsys, *changed), changed
    assert not list(tmp_path.iterdir())
