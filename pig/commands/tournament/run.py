"""Gives the commands of a tournament, each in a process of its own; what is finished is not done again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pig.commands.tournament import plan
from pig.commands.tournament.checks import check_inputs, check_plan, check_subjects
from pig.commands.tournament.config import Tournament, load_config
from pig.commands.tournament.estimate import estimate
from pig.commands.tournament.page import write_pages
from pig.commands.tournament.plan import Chain, Step
from pig.commands.tournament.standings import selection, trials_of
from pig.costs import machine
from pig.errors import InputError, check_ranges
from pig.executors import ExecutorName, execute
from pig.files import check_folder, locked, make_folder, read_json, sha256_of, write_text
from pig.mistakes import check_claim
from pig.models.backbone import fast_precision
from pig.models.names import TOYWORLD
from pig.processes import die_with_parent

SETTINGS, RECORDS, LOGS = "settings.json", "records", "logs"
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
        experiment: the YAML file, then overrides, such as `samples=6400 seeds=[0]`.
        dry_run: print the plan, and run nothing: the commands that are known before the first one has run; at full size
            also hours of a GPU, disk and downloads, which takes minutes to count.
        also: folders of images by other programs, `SUBJECT/PROMPT_INDEX/SEED.png`, which join the table.
        executor: `local` starts processes on this machine, `ray` uses the cluster at RAY_ADDRESS (with a shared disk).
        workers: number of commands that run at the same time. On GPUs each has one; a command that runs alone has all
            (with Ray only those of `data`, which run on this machine). Durations are comparable only if the commands
            do not share cores.
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
    check_plan(told)
    check_folder(told.folder())
    if dry_run:
        print_plan(told, guests)
        return
    check_inputs(told)
    make_folder(told.folder())
    with locked(told.folder()):
        claim_folder(told)
        how = {"executor": executor, "workers": workers, "threads": threads}
        run = partial(run_stage, told.folder(), how)
        stages = plan.stages(told, guests)
        # On this machine: a worker of Ray would have one GPU, where these commands may use all.
        run_stage(told.folder(), how | {"executor": "local"}, "data", stages.pop("data"))
        check_subjects(told)
        for name, chains in stages.items():
            run(name, chains)
        choose(told)
        run("training, equal time", plan.trainings(told, plan.TIME))
        run("drawing and scoring", plan.drawings(told))
        for file in write_pages(told, guests):
            console.print(f"  {file}", highlight=False)


def claim_folder(config: Tournament) -> None:
    """A folder holds one tournament: of these settings, and of these contents of the files that they name. Methods may
    join it; claims may change, for they change nothing that is made.

    Raises:
        InputError: it was begun with other settings or files.
    """
    told = asdict(config)
    del told["claims"]
    told["precision"] = fast_precision()  # which the toy world's configs train in
    lines = [*config.data, config.scorer, config.prompts, config.fit, config.drawing, config.trying, config.scoring]
    for one in config.methods.values():
        lines += [one.config, one.words, one.drawn, one.common, *one.trials]
    named = sorted({Path(word.rpartition("=")[2]) for line in lines for word in config.split(line)})
    told["contents"] = {
        str(file): sha256_of(file) for file in named if file.is_file() and not file.is_relative_to(config.folder())
    }
    file = config.folder() / SETTINGS
    if file.is_file():
        then = read_json(file, "")
        begun = {
            key: {name: one for name, one in told[key].items() if name in then.get(key, {})}
            for key in ("methods", "contents")
        }
        check_claim(file, {**told, **begun}, "give another out=FOLDER, or the same settings and files")
    write_text(file, json.dumps(told, indent=1) + "\n")


def print_plan(config: Tournament, guests: Sequence[Path]) -> None:
    """All commands, as far as they are known before the first one has run."""
    table, stages = Table("stage", "commands"), plan.stages(config, guests)
    for name, chains in stages.items():
        if chains:
            table.add_row(name, str(sum(map(len, chains))))
    if config.same_time:
        count = sum(one.budget == plan.TIME for one in plan.entries(config))
        table.add_row("training, equal time", f"{2 * count}; their lengths follow from what the first ones take")
    drawn = sum(len(plan.conditions(config, one)) for one in plan.entries(config))
    table.add_row("drawing and scoring", f"{2 * drawn + len(config.methods)}")
    console.print(table)
    if config.base != f"base:{TOYWORLD}":
        sizes = Table(title="at full size", show_header=False)
        sizes.add_column()
        sizes.add_column(overflow="fold")  # names of models stay whole
        for row in estimate(config):
            sizes.add_row(*row)
        console.print(sizes)
    for chains in stages.values():
        for chain in chains:
            for step in chain:
                console.print(f"python -m {shlex.join(step.words)}", highlight=False, markup=False)


def run_stage(out: Path, how: dict[str, Any], stage: str, chains: Sequence[Chain]) -> None:
    """Run chains of commands over processes or machines.

    Args:
        out: the tournament's folder, which holds a record and a log of each command.
        how: executor, workers and threads, as `execute` takes them.

    Raises:
        InputError: commands that failed, with the ends of their logs; the others were run.
    """
    if not chains:
        return
    todo = [chain for chain in chains if not all(is_done(out, step) for step in chain)]
    console.print(f"{stage}: {len(chains)} to do, {len(chains) - len(todo)} of them finished already")
    failed, began = [], time.perf_counter()
    work = partial(make_worker, out.absolute(), os.getcwd(), how["threads"], len(chains) == 1)
    for number, (name, why) in enumerate(filter(None, execute(work, todo, **how) if todo else ()), 1):
        minutes = (time.perf_counter() - began) / 60
        left = minutes / number * (len(todo) - number)
        console.print(f"  {name}: {'failed' if why else 'done'}; {minutes:.1f} min, left about {left:.0f} min")
        failed += [why] if why else []
    if failed:
        raise InputError("\n".join(failed))


def record_of(out: Path, step: Step) -> Path:
    return out / RECORDS / f"{step.name}.json"


def is_done(out: Path, step: Step) -> bool:
    """
    Raises:
        InputError: it was run with other words.
    """
    file = record_of(out, step)
    if step.anew or not file.is_file():
        return False
    then = read_json(file, "").get("words")
    if then != list(step.words):
        odd = next((word for word in step.words if not isinstance(then, list) or word not in then), "fewer words")
        raise InputError(f"{step.name} was done with other words, now it has {odd}: remove {file} and what it has made")
    return True


def make_worker(out: Path, cwd: str, threads: int, alone: bool, device: str) -> Callable[[Chain], tuple[str, str]]:
    """alone: no other command runs at the same time, and all GPUs are its own."""
    os.chdir(cwd)  # folders are named relative to it
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if device.startswith("cuda:") and not alone:
        number, seen = device.removeprefix("cuda:"), os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(number)] if seen else number
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
    if step.words[:2] == ("pig.cli", "tune"):  # which does not go by OMP_NUM_THREADS
        words.append(f"--threads={environment['OMP_NUM_THREADS']}")
    began = time.perf_counter()
    with log.open("ab") as stream:
        stream.write(f"$ python -m {shlex.join(words)}\n".encode())
        stream.flush()
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
    """Note each method's best trial; of equal ones (DINO may be negative for all), the one with the highest CLIP-T."""
    for name, method in config.methods.items():
        if method.trials:
            results = trials_of(config, name)
            found = {line: selection(result) for line, result in results.items()}
            best = max(found, key=lambda line: (found[line], results[line].scores["clip_t"]["mean"]))
            told = {"words": config.split(best), "trials": found}
            write_text(config.folder() / name / plan.CHOSEN, json.dumps(told, indent=1) + "\n")
