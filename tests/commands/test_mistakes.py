"""Mistakes of every command: a message that names the thing, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data_gen.__main__ as data_gen
from pig import cli
from pig.errors import InputError, WorkerDiedError, ending
from pig.files import locked
from pig.methods import load_pipeline
from pig.methods.ezigen import EZIGen
from pig.models.names import WEIGHTS

TOY = "configs/bootpig/toyworld.yaml"


@pytest.fixture
def told(monkeypatch, capsys):
    """Runs a command line and returns exit code and message."""

    def run(*words: object, program: object = cli.main) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pig", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            program()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    Image.new("L", (64, 64), 255).save(tmp_path / "a.mask.png")
    return path


def test_an_output_that_cannot_be_written(told, toy_data, picture, tmp_path) -> None:
    one = ["--references", picture, "--prompt", "a mug"]
    fit = [f"--data.shards={toy_data / 'triplets'}", "--data.val_shards=null", "--trainer.max_steps=1"]
    tune = [f"--subjects={toy_data / 'subjects'}", "--data.prior=null", "--trainer.max_steps=1", "--model.save_at=[]"]
    commands = [
        (cli.main, ["generate", *one], "--out"),
        (cli.main, ["export", "--model=toyworld"], "--out"),
        (cli.main, ["tune", "--config=configs/dreambooth/toyworld.yaml", *tune], "--out"),
        (cli.main, ["fit", f"--config={TOY}", *fit], "--run"),
        (data_gen.main, ["triplets"], "--out"),
        (data_gen.main, ["subjects"], "--out"),
        (data_gen.main, ["photos", f"--photos={tmp_path}", "--object=mug"], "--out"),
        (data_gen.main, ["inspect", toy_data / "triplets"], "--out"),
        (data_gen.main, ["encode", toy_data / "triplets", "--base=toyworld", "--resolution=64"], "--out"),
    ]
    file = tmp_path / "file"
    file.write_text("mine")
    for program, words, flag in commands:
        for bad in (file / "below", "/proc/nowhere"):
            code, message = told(*words, f"{flag}={bad}", program=program)
            assert code == 2, (words, message)
            assert "error: " in message, words
            assert str(bad) in message or str(file) in message, (words, message)
        code, message = told(*words, f"{flag}=", program=program)
        assert (code, f"{flag} is empty" in message) == (2, True), (words, message)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.lr_refrence=1"], "model.lr_refrence is no option; did you mean model.lr_reference?"),
        (["--modle.lr=1"], "--modle.lr is no option here"),
        (["--data.seed=1.5"], "data.seed: '1.5' is not a whole number"),
        (["--trainer.max_steps=abc"], "trainer.max_steps: 'abc' is not a whole number"),
        (["--trainer.max_steps=-5"], "trainer: `max_steps` must be a non-negative integer"),
        (["--trainer.devices=-3"], "trainer: `devices`"),
        (["--data.num_workers=-1"], "data.num_workers must be between 0 and 1024, got -1"),
        (["--model.lr_reference=.nan"], "learning rates must be at least 0"),
        (["--seed_everything=-3"], "--seed_everything: -3 is not in bounds"),
        (["--ckpt_path=best"], "--ckpt_path best: only the run itself knows it"),
    ],
)
def test_numbers_and_names_of_fit(told, tmp_path, words, message) -> None:
    code, said = told("fit", f"--config={TOY}", f"--run={tmp_path / 'run'}", *words)
    assert (code, message in said) == (2, True), said


def test_a_mistyped_key_of_a_config(told, tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("promt: [a mug]\n")
    code, said = told("generate", f"--config={config}", f"--out={tmp_path / 'out'}")
    assert (code, "--config: promt is no option; did you mean prompt?" in said) == (2, True), said


def test_what_a_card_shows(told, picture, tmp_path) -> None:
    out = tmp_path / "out"
    for words, message in (
        (["--references", picture], "--references are for the card's pictures, with --prompt"),
        (["--format=kohya", "--prompt", "a"], "are for a folder, not for --format kohya"),
        (["--step=5"], "--step is no option"),
    ):
        target = f"{out}.safetensors" if "--format=kohya" in words else out
        code, said = told("export", "--model=toyworld", f"--out={target}", *words)
        assert (code, message in said) == (2, True), said


def test_two_runs_in_one_folder(told, toy_data, tmp_path) -> None:
    folder = tmp_path / "run/fit/checkpoints"
    folder.mkdir(parents=True)
    words = [f"--data.shards={toy_data / 'triplets'}", "--data.val_shards=null"]
    with locked(folder):
        code, said = told("fit", f"--config={TOY}", f"--run={tmp_path / 'run'}", *words, "--trainer.max_steps=1")
    assert (code, f"another run is writing into {folder}" in said) == (2, True), said


def test_configs_that_are_none(told, picture, tmp_path) -> None:
    bomb = tmp_path / "bomb.yaml"
    rows = [f"{name}: &{name} [{', '.join([f'*{one}'] * 9)}]" for one, name in zip("abcdefgh", "bcdefghi", strict=True)]
    bomb.write_text("\n".join([f"a: &a [{', '.join('1' * 9)}]", *rows]))
    for words in (["fit"], ["generate", "--out=x", "--prompt=a"], ["tune", "--subjects=x", "--out=x"]):
        for config in (picture, bomb):
            code, said = told(*words, f"--config={config}")
            assert (code, f"error: --config {config}: " in said) == (2, True), said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["triplets", "--count=-1"], "--count must be between 1"),
        (["triplets", "--size=0"], "--size must be between 8"),
        (["triplets", "--first_seed=-5"], "--first_seed must be between 0"),
        (["triplets", "--cuont=5"], "--cuont is no option here; did you mean --count?"),
        (["subjects", "--count=0"], "--count must be between 1"),
        (["photos", "--photos=.", "--object= "], "--object is empty"),
        (["photos", "--photos=.", "--object=dog", "--size=0"], "--size must be between 8"),
    ],
)
def test_numbers_of_data_gen(told, tmp_path, words, message) -> None:
    code, said = told(*words, f"--out={tmp_path / 'out'}", program=data_gen.main)
    assert (code, message in said) == (2, True), said
    assert not (tmp_path / "out").exists()


def test_damaged_models_and_odd_requests(told, picture, tmp_path) -> None:
    not_finite, lacking = tmp_path / "nan", tmp_path / "lacking"
    pipeline = load_pipeline("toyworld", "cpu")
    pipeline.save_pretrained(lacking)
    weights = lacking / "base_unet/diffusion_pytorch_model.safetensors"
    save_file({name: one for name, one in load_file(weights).items() if name != "conv_out.weight"}, weights)
    with torch.no_grad():
        next(pipeline.base_unet.parameters()).fill_(float("nan"))
    pipeline.save_pretrained(not_finite)
    pixel = tmp_path / "pixel.png"
    Image.open(picture).save(pixel)
    mask = Image.new("L", (64, 64))
    mask.putpixel((9, 9), 255)
    mask.save(tmp_path / "pixel.mask.png")
    one = ["--references", picture, "--prompt", "a mug"]
    for words, message in (
        ([*one, f"--model={lacking}"], "lacks the weights conv_out.weight"),
        ([*one, f"--model={not_finite}", "--steps=1"], "has drawn numbers that are not finite"),
        ([*one, "--images_per_prompt=1000000000"], "--images_per_prompt must be between 1 and 100000"),
        (["--references", pixel, "--prompt", "a mug"], "leaves 1 pixels: too few"),
    ):
        code, said = told("generate", f"--out={tmp_path / 'out'}", *words)
        assert (code, message in said) == (2, True), said
        assert not list(tmp_path.rglob("out/references/*/*.png"))


def test_doubts_are_said_before_drawing() -> None:
    pipeline = load_pipeline("toyworld", "cpu")
    assert pipeline.doubts(["a photo of a mug, on a beach"], None, None) == []
    unknown, large = pipeline.doubts(["a photo of a dog"], 512, 512)
    assert "never seen the word(s) dog; it knows: beach, " in unknown
    assert "512x512 is 64 times the area" in large


def test_what_ends_a_command() -> None:
    """Errors of libraries, by what is behind them; what only a traceback explains is left alone."""
    assert ending(KeyboardInterrupt()) == (130, "stopped; what was finished is kept")
    wrapped = RuntimeError("outer")
    wrapped.__cause__ = InputError("no such thing")
    assert ending(wrapped) == (2, "error: no such thing")
    full = "the disk is full"
    for error in (
        OSError(errno.ENOSPC, "No space left on device", "/x/y"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/27"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        code, message = ending(error) or (0, "")
        assert (code, full in message) == (1, True)
    assert ending(PermissionError(errno.EACCES, "Permission denied", "/x")) == (2, "error: /x: Permission denied")
    code, message = ending(WorkerDiedError("a worker died")) or (0, "")
    assert (code, "start again to go on" in message) == (1, True)
    assert ending(ZeroDivisionError()) is None
    inside = ZeroDivisionError()
    inside.__context__ = FileNotFoundError(errno.ENOENT, "No such file", "/x")  # raised while that was handled
    assert ending(inside) is None
    taken_for_bad_input = InputError("cannot write into /x")
    taken_for_bad_input.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/x")
    assert (ending(taken_for_bad_input) or (0, ""))[0] == 1
    assert ending(OSError(errno.EIO, "I/O error")) is None


def test_weights_that_are_not_finite(tmp_path) -> None:
    shutil.copytree(WEIGHTS / "ezigen", tmp_path / "delta")
    file = tmp_path / "delta/delta.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    save_file({**weights, first: torch.full_like(weights[first], torch.nan)}, file)
    with pytest.raises(InputError, match="holds numbers that are not finite"):
        load_pipeline(tmp_path / "delta", "cpu")
    module = EZIGen("toyworld")
    state = {name: one.detach().clone() for name, one in module.trainable().items()}
    module.load_state_dict(state)
    state[min(state)].view(-1)[0] = torch.inf
    with pytest.raises(InputError, match="go on from an earlier one"):
        module.load_state_dict(state)
