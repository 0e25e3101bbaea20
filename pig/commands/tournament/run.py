"""Gives the commands of a tournament, each in a process of its own; what is finished is not done again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from pig.commands.tournament import plan
from pig.commands.tournament.config import Tournament, load_config
from pig.commands.tournament.estimate import estimate
from pig.commands.tournament.page import write_pages
from pig.commands.tournament.plan import Chain, Step
from pig.commands.tournament.standings import selection
from pig.costs import machine
from pig.errors import InputError, check_ranges
from pig.evaluation.results import Result
from pig.executors import ExecutorName, execute
from pig.files import check_folder, locked, make_folder, read_json, write_text
from pig.mistakes import flat, read_config
from pig.models.names import TOYWORLD
from pig.processes import die_with_parent

SETTINGS, RECORDS, LOGS = "tournament.yaml", "records", "logs"
console = Console(soft_wrap=True)


def tournament(
    experiment: list[str],
    /,
    dry_run: bool = False,
    also: list[Path] | None = None,
    executor: ExecutorName = "local",
    workers: int = 1,
    threads: int = 1,
) -> None:
    """Train, tune, draw, score and compare all methods that a file names. A stopped tournament continues.

    Args:
        experiment: the YAML file, and behind it values over it, such as `samples=6400 seeds=[0]`.
        dry_run: print the commands, and do nothing.
        also: folders of images by other programs, `SUBJECT/PROMPT_INDEX/SEED.png`, which join the table.
        executor: `local` starts processes on this machine, `ray` uses the cluster at RAY_ADDRESS (with a shared disk).
        workers: number of commands that run at the same time; with GPUs, each uses one. Times are comparable if they
            do not take each other's cores.
        threads: CPU threads of each.
    """
    told = load_config(Path(experiment[0]), experiment[1:])
    check_ranges(**{"--workers": (workers, 1, 4096), "--threads": (threads, 1, 1024)})
    guests = also or []
    for folder in guests:
        if not any(folder.glob("*/*/*.*")):
            raise InputError(f"--also: {folder} holds no images SUBJECT/PROMPT_INDEX/SEED.png")
    if len({folder.resolve().name for folder in guests} - told.methods.keys()) < len(guests):
        raise InputError("--also: folders of the same name, or of a method's: rename them")
    plan.check_claims(told)
    check_folder(told.folder())
    if dry_run:
        print_plan(told, guests)
        return
    make_folder(told.folder())
    with locked(told.folder()):
        claim(told)
        runner = Runner(told.folder(), executor, workers, threads)
        runner.run("data", plan.data(told))
        runner.run("training, equal samples", plan.trainings(told, plan.SAMPLES))
        runner.run("tuning", plan.tunings(told))
        if told.same_time:
            runner.run("training, equal time", plan.trainings(told, plan.TIME))
        runner.run("trials of settings", plan.trials(told))
        choose(told)
        joining = plan.guests(told, guests)
        for step in (step for chain in joining for step in chain):
            record_of(told.folder(), step).unlink(missing_ok=True)  # their images may have changed
        runner.run("drawing and scoring", [*plan.drawings(told), *joining])
        for file in write_pages(told, guests):
            console.print(f"  {file}", highlight=False)


def claim(config: Tournament) -> None:
    """A folder holds one tournament; its claims may change, for they change nothing that is made.

    Raises:
        InputError: it was begun with other settings.
    """
    file, now = config.folder() / SETTINGS, OmegaConf.structured(config)
    if file.is_file():
        then, told = (
            {key: value for key, value in flat(tree).items() if key != "claims"}
            for tree in (read_config(str(file)), OmegaConf.to_container(now))
        )
        for key in [*told, *then]:
            if then.get(key) != told.get(key):
                raise InputError(
                    f"{config.out} was begun with other settings: {key} was {then.get(key)}, now it is "
                    f"{told.get(key)}. Give another out=FOLDER, or the same settings ({file})"
                )
    write_text(file, OmegaConf.to_yaml(now))


def print_plan(config: Tournament, guests: Sequence[Path]) -> None:
    """All commands, as far as they are known before the first one has run."""
    stages = {
        "data": plan.data(config),
        "training, equal samples": plan.trainings(config, plan.SAMPLES),
        "tuning": plan.tunings(config),
        "trials of settings": plan.trials(config),
    }
    table = Table("stage", "commands")
    for name, chains in stages.items():
        table.add_row(name, str(sum(map(len, chains))))
    if config.same_time:
        count = sum(one.budget == plan.TIME for one in plan.entries(config))
        table.add_row("training, equal time", f"{2 * count}; their lengths follow from what the first ones take")
    drawn = sum(len(plan.conditions(config, one)) for one in plan.entries(config))
    table.add_row("drawing and scoring", f"{2 * drawn + len(config.methods) + len(guests)}")
    console.print(table)
    if config.base != f"base:{TOYWORLD}":
        sizes = Table("", "", title="at full size", show_header=False)
        for row in estimate(config):
            sizes.add_row(*row)
        console.print(sizes)
    for chains in stages.values():
        for chain in chains:
            for step in chain:
                console.print(f"python -m {shlex.join(step.words)}", highlight=False, markup=False)


class Runner:
    """Runs chains of commands over processes or machines.

    Args:
        out: the tournament's folder, which holds a record and a log of each command.
    """

    def __init__(self, out: Path, executor: ExecutorName, workers: int, threads: int) -> None:
        self.out, self.threads = out, threads
        self.how: dict[str, Any] = {"executor": executor, "workers": workers, "threads": threads}

    def run(self, stage: str, chains: Sequence[Chain]) -> None:
        """
        Raises:
            InputError: commands that failed, with the ends of their logs; the others were run.
        """
        todo = [chain for chain in chains if not all(is_done(self.out, step) for step in chain)]
        console.print(f"{stage}: {len(chains)} to do, {len(chains) - len(todo)} of them finished already")
        failed, began = [], time.perf_counter()
        work = partial(make_worker, self.out.absolute(), os.getcwd(), self.threads)
        for number, (name, why) in enumerate(self._results(work, todo), 1):
            minutes = (time.perf_counter() - began) / 60
            left = minutes / number * (len(todo) - number)
            console.print(f"  {name}: {'failed' if why else 'done'}; {minutes:.1f} min, left about {left:.0f} min")
            failed += [why] if why else []
        if failed:
            raise InputError("\n".join(failed))

    def _results(self, work: Callable[[str], Any], todo: Sequence[Chain]) -> Iterator[tuple[str, str]]:
        if todo:
            yield from (one for one in execute(work, todo, **self.how) if one is not None)


def record_of(out: Path, step: Step) -> Path:
    return out / RECORDS / f"{step.name}.json"


def is_done(out: Path, step: Step) -> bool:
    """
    Raises:
        InputError: it was done by other words.
    """
    file = record_of(out, step)
    if not file.is_file():
        return False
    then = read_json(file, "").get("words")
    if then != list(step.words):
        odd = next((word for word in step.words if not isinstance(then, list) or word not in then), "fewer words")
        raise InputError(f"{step.name} was done with other words, now it has {odd}: remove {file} and what it has made")
    return True


def make_worker(out: Path, cwd: str, threads: int, device: str) -> Callable[[Chain], tuple[str, str]]:
    os.chdir(cwd)  # folders are named relative to it
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if device.startswith("cuda:"):
        environment["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    return partial(run_chain, out, environment)


def run_chain(out: Path, environment: dict[str, str], chain: Chain) -> tuple[str, str]:
    """Its last command's name; and why it failed, if it did."""
    for step in chain:
        if not is_done(out, step):
            try:
                run_step(out, environment, step)
            except InputError as error:
                return step.name, str(error)
    return chain[-1].name, ""


def run_step(out: Path, environment: dict[str, str], step: Step) -> None:
    log = out / LOGS / f"{step.name}.log"
    make_folder(log.parent)
    if step.data is not None and step.data[0].is_dir() and not step.data[1].exists():
        make_folder(step.data[1].parent)
        step.data[1].symlink_to(step.data[0].absolute())
    words = list(step.words)
    if step.resume is not None and step.resume.is_file():
        words.append(f"--ckpt_path={step.resume}")
    began = time.perf_counter()
    with log.open("ab") as stream:
        command = [sys.executable, "-W", "ignore", "-m", *words]
        running = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment, preexec_fn=die_with_parent
        )
        _, status, usage = os.wait4(running.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        end = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise InputError("\n".join([f"{step.name}: exit code {code}; {log} ends with:", *end]))
    told = {
        "words": step.words,
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "machine": machine(),
    }
    make_folder(record_of(out, step).parent)
    write_text(record_of(out, step), json.dumps(told, indent=1) + "\n")


def choose(config: Tournament) -> None:
    """Note each method's best trial."""
    for name, method in config.methods.items():
        folders = [plan.trial_folder(config, name, number) for number in range(len(method.trials))]
        found = [selection(Result.read(folder / "scores")) for folder in folders]
        if found:
            best = max(range(len(found)), key=found.__getitem__)
            told = {"words": config.split(method.trials[best]), "trials": dict(zip(method.trials, found, strict=True))}
            write_text(config.folder() / name / plan.CHOSEN, json.dumps(told, indent=1) + "\n")
