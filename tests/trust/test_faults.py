"""What can go wrong under every command that writes: a full disk, a disk that is read-only, kill -9 at any moment, two
processes on one output, temporary files on another file system. Nothing half-written is taken for whole, nothing that
is finished is lost, and the same command, given again, ends with what an undisturbed one makes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import data_gen.__main__ as data_gen
from pig import cli
from pig.files import replacing, write_text
from pig.toyworld import scene
from pig.training.checkpoints import load_checkpoint

DREAMBOOTH = "configs/dreambooth/toyworld.yaml"


class Disk:
    """A file system of its own, whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(self.folder)], check=True)

    def freeze(self) -> None:
        """Nothing can be written any more: root may write where only permissions forbid it."""
        subprocess.run(["mount", "-o", "remount,ro", str(self.folder)], check=True)


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
    for name in ("first", "second"):
        cli.run([*scored(folder), f"--name={name}", f"--out={folder / name}"])
    return folder


def scored(folder: Path) -> list[str]:
    return ["evaluate", f"--images={folder / 'drawn'}", "--references", str(folder / "0.png")]


def of_pictures(folder: Path) -> list[str]:
    return ["--references", str(folder / "0.png"), "--prompt", "a mug", "a photo of a mug", "--steps=1"]


def contents(folder: Path) -> dict[str, str]:
    """Of all files but logs of when and where something was done."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix not in (".html", ".json", ".jsonl", ".yaml")
    }


@dataclass(frozen=True)
class Command:
    """words: for a folder of pictures and one of toy data. too_little: kilobytes of a disk that its output fills. out:
    how it is told its output."""

    words: Callable[[Path, Path], list[str]]
    too_little: int
    program: Callable[[], None] = cli.main
    out: str = "--out={}"


SHORT_CHAIN = ["captions.count=6", "shards.size=3", "images.steps=3", "shards.attempts=2", "workers=1"]
COMMANDS = {
    "triplets": Command(lambda *_: ["triplets", "--count=60"], 100, data_gen.main),
    "subjects": Command(lambda *_: ["subjects", "--count=4"], 60, data_gen.main),
    "photos": Command(lambda own, _: ["photos", f"--photos={own}", "--object=mug", "--size=96"], 40, data_gen.main),
    "encode": Command(
        lambda _, toy: ["encode", str(toy / "triplets"), "--base=toyworld", "--resolution=64"], 200, data_gen.main
    ),
    "inspect": Command(lambda _, toy: ["inspect", str(toy / "triplets")], 40, data_gen.main),
    "chain": Command(lambda *_: ["configs/datagen/toyworld.yaml", *SHORT_CHAIN], 24, data_gen.main, "output={}"),
    "generate": Command(lambda own, _: ["generate", *of_pictures(own), "--images_per_prompt=3"], 24),
    "attention": Command(lambda own, _: ["attention", *of_pictures(own)[:4], "--steps=1"], 24, out="--out={}/maps.png"),
    "export": Command(lambda *_: ["export", "--model=toyworld"], 9000),
    "evaluate": Command(lambda own, _: scored(own), 24),
    "compare": Command(lambda own, _: ["compare", str(own / "first"), str(own / "second")], 24),
}
SLOW = ("chain", "encode", "export", "generate")
EACH = [pytest.param(name, marks=pytest.mark.slow) if name == "chain" else name for name in COMMANDS]
# What goes on in a folder, or makes it anew.
RERUN = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in COMMANDS
    if name not in ("inspect", "attention", "compare")
]


def run(command: str, pictures: Path, toy_data: Path, out: Path) -> int:
    """Its exit code."""
    one = COMMANDS[command]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pig", *one.words(pictures, toy_data), one.out.format(out)])
        try:
            one.program()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


# Its children have one thread and the imports. A fork of this process may hang on locks of its other threads.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pig.cli", "pig.methods", "pig.evaluation.benchmark", "data_gen.__main__"])


def quietly(what: Callable[..., int | None], *given: Any) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.exit(what(*given))


def started(what: Callable[..., int | None], *given: Any) -> BaseProcess:
    """A process that ends with what `what` returns."""
    process = SERVER.Process(target=quietly, args=(what, *given))
    process.start()
    return process


def ended(process: BaseProcess) -> int | None:
    """Its exit code. One that hangs is killed: Python would wait for it at its own end."""
    process.join(200)
    process.kill()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("command", EACH)
def test_a_full_disk(disk, pictures, toy_data, tmp_path, capsys, command) -> None:
    disk.resize(COMMANDS[command].too_little)
    assert run(command, pictures, toy_data, disk.folder / "out") == 1
    assert "error: the disk is full" in capsys.readouterr().err
    disk.resize(200_000)
    assert run(command, pictures, toy_data, disk.folder / "out") == 0
    assert run(command, pictures, toy_data, tmp_path / "undisturbed") == 0
    assert contents(disk.folder / "out") == contents(tmp_path / "undisturbed")
    assert contents(disk.folder / "out") or command in ("evaluate", "compare")
    shutil.rmtree(disk.folder / "out")
    left = [path.name for path in disk.folder.rglob("*") if path.is_file()]
    assert not left, f"left beside the output: {left}"


@pytest.mark.parametrize("command", EACH)
def test_a_disk_that_is_read_only(disk, pictures, toy_data, capsys, command) -> None:
    disk.freeze()
    assert run(command, pictures, toy_data, disk.folder / "out") in (1, 2)
    said = capsys.readouterr().err
    assert "error: " in said
    assert "Traceback" not in said
    assert str(disk.folder) in said


def test_other_commands_on_a_disk_that_is_read_only(disk, pictures, toy_data, tmp_path, monkeypatch, capsys) -> None:
    disk.freeze()
    results, subjects = [str(pictures / name) for name in ("first", "second")], str(toy_data / "subjects")
    for words in (
        ["study", *results, "--port=0", f"--out={disk.folder / 'study'}"],
        ["app", f"--out={disk.folder / 'app'}"],
        [
            "tune",
            "--config=configs/dreambooth/toyworld.yaml",
            f"--subjects={subjects}",
            f"--out={disk.folder / 'tuned'}",
        ],
        ["fit", training(toy_data, disk.folder / "fit", tmp_path / "fit.yaml")],
    ):
        monkeypatch.setattr(sys, "argv", ["pig.cli", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert (ended.value.code in (1, 2), "Traceback" in said) == (True, False), said
        # Without Gradio the page ends before it writes.
        assert str(disk.folder) in said or "needs Gradio" in said


@pytest.mark.parametrize("command", RERUN)
def test_killed_at_any_moment(pictures, toy_data, tmp_path, command) -> None:
    given = (run, command, pictures, toy_data)
    assert ended(started(int)) == 0  # the first one waits for the server's imports, which must not be timed
    began = time.perf_counter()
    assert ended(started(*given, tmp_path / "undisturbed")) == 0
    whole = time.perf_counter() - began
    moments = random.Random(command)
    for _ in range(2):
        child = started(*given, tmp_path / "out")
        time.sleep(moments.random() * whole)
        child.kill()
        ended(child)
    assert ended(started(*given, tmp_path / "out")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def killed_while_writing(path: Path) -> None:
    with replacing(path) as aside:
        aside.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_leaves_is_removed(tmp_path) -> None:
    ended(started(killed_while_writing, tmp_path / "a[1].json"))
    mine = tmp_path / f".a[1].json.{os.getppid()}.part"  # of a process that runs
    mine.touch()
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "a[1].json", "{}")
    assert sorted(tmp_path.iterdir()) == [mine, tmp_path / "a[1].json"]


@pytest.mark.parametrize("command", RERUN)
def test_two_processes_on_one_output(pictures, toy_data, tmp_path, command) -> None:
    """One may be refused; if both write, they write the same."""
    given = (run, command, pictures, toy_data, tmp_path / "out")
    codes = [ended(child) for child in [started(*given), started(*given)]]
    assert set(codes) <= {0, 2}
    assert ended(started(*given)) == 0
    assert ended(started(*given[:-1], tmp_path / "undisturbed")) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("command", EACH)
def test_temporary_files_on_another_file_system(disk, pictures, toy_data, tmp_path, monkeypatch, command) -> None:
    disk.resize(200_000)
    monkeypatch.setattr("tempfile.tempdir", str(disk.folder))
    assert run(command, pictures, toy_data, tmp_path / "out") == 0
    assert not [path for path in disk.folder.rglob("*") if path.is_file()]


def training(toy_data: Path, run: Path, file: Path) -> str:
    """The config of two steps with a checkpoint after each, written into the file."""
    checkpoints = {"dirpath": str(run / "ckpt"), "save_last": True, "save_top_k": 0, "every_n_train_steps": 1}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}]
    trainer = {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": False,
        "callbacks": callbacks,
        "default_root_dir": str(run),
    }
    shards = {"shards": str(toy_data / "triplets"), "batch_size": 2, "resolution": 64, "num_workers": 0}
    told = {
        "run": str(run),
        "trainer": {**trainer, "default_root_dir": str(run)},
        "model": {"class_path": "pig.methods.bootpig.BootPIG", "init_args": {"base": "toyworld"}},
        "data": {"class_path": "pig.data.modules.TripletDataModule", "init_args": shards},
    }
    file.write_text(yaml.safe_dump(told))
    return f"--config={file}"


def test_a_training_on_a_full_disk(disk, toy_data, tmp_path, monkeypatch, capsys) -> None:
    """The checkpoint of step 1 fits, that of step 2 beside it does not: the first one stays whole."""

    config = training(toy_data, disk.folder, tmp_path / "fit.yaml")

    def fit(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pig.cli", "fit", config, *more])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    disk.resize(130_000)  # one checkpoint is some 90 MB
    assert fit() == 1
    assert "error: the disk is full" in capsys.readouterr().err
    last = disk.folder / "ckpt/last.ckpt"
    assert load_checkpoint(last)["global_step"] == 1
    assert [path.name for path in last.parent.glob("*.ckpt")] == ["last.ckpt"]
    disk.resize(400_000)
    assert fit(f"--ckpt_path={last}") == 0
    assert load_checkpoint(last)["global_step"] == 2
