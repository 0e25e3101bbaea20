"""`tune`: runs a per-subject method for every subject of a folder, on one machine or several."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.live import Live

from pig.commands.fit import CLI, OVERRIDES, hush
from pig.commands.generate import parse_shard
from pig.data.subject_training import SubjectDataModule
from pig.data.subjects import SubjectFolder, read_subjects
from pig.errors import InputError, WorkerDiedError, find_input_error
from pig.executors import ExecutorName, execute
from pig.files import digest_of, locked, make_folder, write_text
from pig.mistakes import claim, without
from pig.sampling.delta import kept_steps
from pig.training.checkpoints import load_checkpoint
from pig.training.memory import print_memory
from pig.training.tuned import TunedModule

EXPERIMENT, PROGRESS, RUNNING = "tune.json", "progress.json", "running"
INSTEAD = "give another --out, or the same config and pictures"
OWN = ("subjects", "out", "shard", "executor", "workers", "threads")
# What differs from subject to subject, or says where the work is done.
PLACE = (*OWN, "config", "run", "print_memory")
console = Console()


class TuneCLI(CLI):
    """The experiment of a config and its overrides, without a run of its own."""

    description = "Tune one model for each subject of a folder. " + OVERRIDES

    def __init__(self, args: Sequence[str], *, built: bool) -> None:
        super().__init__(args, run=False, built=built)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--subjects", required=True, help="a folder of subjects in DreamBooth's layout")
        executors = "`local`: processes of this machine; `ray`: the cluster at RAY_ADDRESS"
        for name, kind, default, told in (
            ("--shard", str, "0/1", "I/N: tune only part I of N equal parts (I counts from 0)"),
            ("--executor", ExecutorName, "local", executors),
            ("--workers", int, 1, "subjects tuned at the same time; with GPUs, one GPU each"),
            ("--threads", int, 1, "CPU threads of each worker"),
        ):
            parser.add_argument(name, type=kind, default=default, help=told)
        out = "folder for the results, SUBJECT/step-000250/; finished subjects are skipped"
        parser.add_argument("--out", required=True, help=out)

    def experiment(self) -> dict[str, Any]:
        """What decides the weights: all settings but those of place."""
        told = json.loads(self.parser.dump(self.config, format="json", skip_none=False, skip_link_targets=False))
        told = {name: value for name, value in told.items() if name not in PLACE}
        told["data"]["init_args"].pop("subject", None)
        return told


@dataclass(frozen=True)
class Job:
    """One subject to be tuned. args: of the command line, without what is `OWN`."""

    name: str
    folder: Path  # its pictures
    class_noun: str
    out: Path
    args: tuple[str, ...]

    def cli(self) -> TuneCLI:
        own = [f"--data.subject={self.folder}", f"--run={self.out}", f"--data.class_noun={self.class_noun}"]
        return TuneCLI([*self.args, *own, f"--subjects={self.folder.parent}", f"--out={self.out.parent}"], built=True)

    @property
    def work(self) -> Path:
        return self.out / "fit"


def tune(args: Sequence[str]) -> None:
    """Tune all subjects that are not finished.

    Raises:
        InputError: before any work for wrong arguments; at the end with the subjects that failed.
    """
    quiet_lightning()
    told = TuneCLI(args, built=False)
    config = told.config
    if not config.data.class_path.endswith(SubjectDataModule.__name__):
        raise InputError("tune is for methods that are tuned on one subject: its config's data is a SubjectDataModule")
    for name in ("subject", "class_noun"):
        if config.data.init_args[name]:
            raise InputError(f"--data.{name} is for `fit`: `tune` takes all subjects of --subjects")
    part, parts = parse_shard(config.shard)
    if config.workers < 1 or config.threads < 1:
        raise InputError("--workers and --threads must be at least 1")
    out, rest = Path(config.out), tuple(without(args, OWN))
    subjects = read_subjects(Path(config.subjects))
    subjects = subjects[len(subjects) * part // parts : len(subjects) * (part + 1) // parts]
    for one in subjects:
        SubjectDataModule(str(folder_of(one)), class_noun=one.class_noun, resolution=8)  # says what is wrong with it
    pictures = {one.name: one.images for one in subjects}
    jobs = [
        Job(one.name, folder_of(one).absolute(), one.class_noun, (out / one.name).absolute(), rest) for one in subjects
    ]
    if not jobs:
        console.print(f"no subject is in part {config.shard}")
        return
    wanted = check(jobs)
    make_folder(out)
    claim(out / EXPERIMENT, told.experiment(), INSTEAD)
    for job in jobs:
        make_folder(job.out)
        told_of = {"class_noun": job.class_noun, "pictures": digest_of(pictures[job.name])}
        claim(job.out / EXPERIMENT, told_of, INSTEAD)
    todo = [job for job in jobs if not wanted <= kept_steps(job.out).keys()]
    steps = max(wanted)
    for job in jobs:
        if job not in todo:
            shutil.rmtree(job.work / "checkpoints", ignore_errors=True)
        for mark in (PROGRESS, RUNNING):
            (job.work / mark).unlink(missing_ok=True)
    console.print(
        f"{len(jobs)} subjects, {len(jobs) - len(todo)} finished already; {steps} steps for each of the others, "
        f"{config.workers} at a time"
    )
    how: Any = {"executor": config.executor, "workers": config.workers, "threads": config.threads}
    make = partial(make_tuner, config.threads, os.getcwd(), wanted)
    failed: dict[str, str] = {}
    while todo:
        try:
            failed |= follow(todo, steps, execute(make, todo, **how))
            break
        except WorkerDiedError as error:
            # Whose worker it was, is marked; the others go on.
            lost = [job for job in todo if (job.work / RUNNING).is_file()]
            if not lost:
                raise
            failed |= {job.name: str(error) for job in lost}
            todo = [job for job in todo if job not in lost and not wanted <= kept_steps(job.out).keys()]
    if failed:
        raise InputError("\n".join(f"{name} failed: {why}" for name, why in failed.items()))


def folder_of(subject: SubjectFolder) -> Path:
    return subject.images[0].parent


def check(jobs: Sequence[Job]) -> set[int]:
    """The steps that are kept of each subject; model and data are made once, so that mistakes are said now."""
    cli = jobs[0].cli()
    assert isinstance(cli.model, TunedModule)
    cli.model.check(cli.trainer, cli.datamodule)
    if cli.config.print_memory:
        print_memory(cli.model, cli.datamodule, cli.trainer)
    return set(cli.model.kept_steps(cli.trainer))


def follow(jobs: Sequence[Job], steps: int, done: Iterator[Any]) -> dict[str, str]:
    """Show the progress over all subjects until they are done; why some failed."""
    failed: dict[str, str] = {}
    finished: set[str] = set()
    began = told = time.perf_counter()
    with Live(console=console, refresh_per_second=2, transient=not console.is_terminal) as live:
        for result in done:
            if result is not None:
                name, why = result
                finished.add(name)
                if why:
                    failed[name] = why
            noted = {job.name: progress_of(job) for job in jobs}
            each = {name: steps if name in finished else step for name, (step, _) in noted.items()}
            fresh = sum(each[name] - since for name, (_, since) in noted.items())
            seconds = time.perf_counter() - began
            left = (steps * len(jobs) - sum(each.values())) * seconds / fresh if fresh else None
            line = (
                f"subjects {len(finished)}/{len(jobs)}  steps {sum(each.values())}/{steps * len(jobs)}  "
                f"{fresh / seconds:.1f} steps/s  left {'?' if left is None else f'{left / 60:.1f} min'}"
                + (f"  failed {len(failed)}" if failed else "")
            )
            live.update(line)
            if not console.is_terminal and time.perf_counter() - told > 30:  # a log file wants lines
                told = time.perf_counter()
                print(line, flush=True)
    console.print(line)
    return failed


def progress_of(job: Job) -> tuple[int, int]:
    """The step, and the one that this run has begun at."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        told = json.loads((job.work / PROGRESS).read_text(encoding="utf-8"))
        return int(told["step"]), int(told["since"])
    return 0, 0


# -- in a worker ------------------------------------------------------------------------------------------------------


def quiet_lightning() -> None:
    """Its notes would repeat for every subject."""
    hush()
    sys.argv[1:] = []  # which it would compare with the arguments that it is given
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def make_tuner(threads: int, cwd: str, wanted: set[int], device: str) -> Callable[[Job], tuple[str, str]]:
    os.chdir(cwd)  # configs name folders relative to it
    torch.set_num_threads(threads)
    return partial(tune_one, device, wanted)


def tune_one(device: str, wanted: set[int], job: Job) -> tuple[str, str]:
    """Tune a subject from its last checkpoint on; its name, and why it failed, if it did. Other subjects continue if
    this one fails."""
    quiet_lightning()
    make_folder(job.work)
    try:
        with locked(job.work), marked(job.work / RUNNING), contextlib.redirect_stdout(io.StringIO()):
            place = [] if device == "cpu" else ["--trainer.accelerator=gpu", f"--trainer.devices=[{gpu_of(device)}]"]
            cli = Job(**{**vars(job), "args": (*job.args, *place)}).cli()
            trainer: Trainer = cli.trainer
            trainer.callbacks.append(Progress(job.work / PROGRESS))
            for torn in job.out.glob(".step-*"):  # begun when a run was killed
                shutil.rmtree(torn)
            last = job.work / "checkpoints/last.ckpt"
            if last.is_file():
                load_checkpoint(last)  # a torn one is said by its name
            trainer.fit(cli.model, cli.datamodule, ckpt_path=last if last.is_file() else None, weights_only=True)
    except Exception as error:
        mistake = find_input_error(error)
        if mistake is None:
            write_text(job.work / "error.txt", traceback.format_exc())
            return job.name, f"{error} (see {job.work / 'error.txt'})"
        return job.name, str(mistake)
    if missing := wanted - kept_steps(job.out).keys():
        return job.name, f"the steps {sorted(missing)} are not there: delete {job.out} and tune it again"
    shutil.rmtree(job.work / "checkpoints", ignore_errors=True)  # as large as model and optimizer together
    return job.name, ""


@contextlib.contextmanager
def marked(file: Path) -> Iterator[None]:
    """The file is there while the block runs, and stays if the process dies."""
    file.touch()
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def gpu_of(device: str) -> str:
    return device.partition(":")[2] or "0"


class Progress(Callback):
    """Writes the step into a file, where whoever waits can read it."""

    def __init__(self, file: Path) -> None:
        self.file, self.begun, self.told = file, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.perf_counter() - self.told > 0.5 and trainer.is_global_zero:
            self.told = time.perf_counter()
            write_text(self.file, json.dumps({"step": trainer.global_step, "since": self.begun}))
