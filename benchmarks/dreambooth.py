"""Tuning per subject on the toy world: how identity, prompt and diversity move with the steps: `make dreambooth`.

    python -m benchmarks.dreambooth [--out runs/dreambooth_steps] [--subjects 8] [--rows NAME ...]

Each row is one `tune` of all subjects; each of its kept steps is drawn under five prompts, two seeds, and scored, as is
the base model that it starts from. Intervals are of the mean over subjects (95 %, bootstrap). What is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import transformers
from PIL import Image
from rich.console import Console

from benchmarks.sweep import brackets
from data_gen.toyworld import draw_subjects
from pig.cli import run
from pig.data.images import read_generated
from pig.data.subjects import PROMPTS_FILE, SubjectFolder, read_subjects
from pig.demo import toy_scorer
from pig.evaluation.benchmark import Scorer
from pig.sampling.delta import tuned_subjects

Scores = dict[str, list[float]]  # of each subject
NO_PRIOR = "--data.prior=null"
# Row -> config, and the command line over it.
ROWS: dict[str, tuple[str, list[str]]] = {
    "DreamBooth": ("dreambooth/toyworld", []),
    "DreamBooth, no class pictures": ("dreambooth/toyworld", [NO_PRIOR]),
    "LoRA": ("dreambooth/toyworld_lora", []),
    "Textual Inversion": ("textual_inversion/toyworld", []),
}
DRAWN = ["--steps=12", "--images_per_prompt=2", "--text_guidance=3", "--batch_size=10"]
PROMPTS = 5  # of each subject's sixteen
BASE = "base model"
COLUMNS = {
    "dino": "DINO",
    "clip_t": "CLIP-T",
    "prompt_accuracy": "background",
    "diversity": "diversity",
    "px": "pixels",
}
console = Console(soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dreambooth_steps"))
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    chosen = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    out: Path = chosen.out
    console.print(f"{len(chosen.rows)} ways to tune x {chosen.subjects} subjects, some 15 minutes each on a CPU core")
    subjects, scorer = made_subjects(out, chosen.subjects, PROMPTS), toy_scorer(out / "eval")
    found = {BASE: score(scorer, draw(out, BASE, "base:toyworld"), subjects)}
    for name in chosen.rows:
        tuned = tune(out, name, *ROWS[name])
        for step in next(iter(tuned_subjects(tuned).values())):
            images = draw(tuned.parent, f"{step}", str(tuned), f"--step={step}")
            found[f"{name}, {step}"] = score(scorer, images, subjects)
        (out / "tuned.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (out / "tuned.md").write_text(markdown(found), encoding="utf-8")
    figure(found, chosen.rows, out / "tuned.png")
    console.print(f"{out / 'tuned.md'}, {out / 'tuned.json'}, {out / 'tuned.png'}")


def made_subjects(out: Path, count: int, prompts: int) -> list[SubjectFolder]:
    """Held-out subjects, each under the first of its prompts."""
    if not (out / PROMPTS_FILE).exists():
        draw_subjects(out / "subjects", count, 64)
        few_prompts(out / "subjects" / PROMPTS_FILE, out / PROMPTS_FILE, prompts)
    return read_subjects(out / "subjects", out / PROMPTS_FILE)


def tune(out: Path, name: str, config: str, told: list[str]) -> Path:
    """The tuned folder of a row."""
    tuned = out / plain(name) / "models"
    words = ["tune", f"--config=configs/{config}.yaml", f"--subjects={out / 'subjects'}", f"--out={tuned}", *told]
    subprocess.run([sys.executable, "-W", "ignore", "-m", "pig.cli", *words], check=True)
    return tuned


def plain(name: str) -> str:
    """Of a row, as a folder is called."""
    return name.replace(", ", "_").replace(" ", "_").replace("%", "pc")


def draw(out: Path, name: str, model: str, *told: str) -> Path:
    images = out / "images" / plain(name)
    top = next(folder for folder in (out, out.parent) if (folder / PROMPTS_FILE).is_file())
    known = [f"--subjects={top / 'subjects'}", f"--prompts={top / PROMPTS_FILE}"]
    run(["generate", f"--model={model}", *known, f"--out={images}", *DRAWN, *told])
    return images


def few_prompts(listing: Path, fewer: Path, prompts: int) -> None:
    """The same subjects, under the first of their prompts."""
    lines, kept = [], 0
    for line in listing.read_text(encoding="utf-8").splitlines():
        kept = 0 if line.startswith("prompt_list") else kept + (".format(" in line)
        if ".format(" not in line or kept <= prompts:
            lines.append(line)
    fewer.write_text("\n".join(lines) + "\n", encoding="utf-8")


def score(scorer: Scorer, images: Path, subjects: list[SubjectFolder]) -> Scores:
    return {**scorer.score(images, subjects).per_subject(), "px": pixel_distance(images, subjects)}


def pixel_distance(images: Path, subjects: list[SubjectFolder]) -> list[float]:
    """Of each subject: root of the mean squared distance of a prompt's pictures, in [0, 2], over its prompts."""
    pictures: dict[tuple[str, int], list[np.ndarray]] = {}
    for one in read_generated(images, subjects):
        pixels = np.asarray(Image.open(one.path), dtype=np.float32) / 127.5 - 1
        pictures.setdefault((one.subject.name, one.prompt_index), []).append(pixels)
    return [
        fmean(
            float(np.sqrt(np.mean((first - second) ** 2)))
            for (name, _), (first, second, *_) in pictures.items()
            if name == subject.name
        )
        for subject in subjects
    ]


def markdown(found: dict[str, Scores]) -> str:
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, scores in found.items():
        cells = [f"{fmean(scores[one]):.3f} {brackets(scores[one])}" for one in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def figure(found: dict[str, Scores], rows: list[str], file: Path) -> None:
    """DreamBlend's Fig. 1 (arXiv 2411.19390): the paths of the checkpoints, from the base model on."""
    plot, _ = paths(found, rows)
    plot.savefig(file, dpi=110)


def paths(found: dict[str, Scores], rows: list[str]) -> tuple[Any, tuple[Any, Any]]:
    """A plot of two planes, DINO over CLIP-T and over the distance of pixels, with a path for each row."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    plot, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name in rows:
        steps = [BASE, *(one for one in found if one.rpartition(", ")[0] == name)]
        for axes, across in ((left, "clip_t"), (right, "px")):
            x, y = ([fmean(found[one][score]) for one in steps] for score in (across, "dino"))
            (line,) = axes.plot(x, y, marker="o", markersize=4, label=name)
            for at, one in enumerate(steps[1:], 1):
                label = one.rpartition(", ")[2]
                axes.annotate(
                    label, (x[at], y[at]), (3, 3), textcoords="offset points", fontsize=7, color=line.get_color()
                )
    left.set(xlabel="CLIP-T (prompt)", ylabel="DINO (subject)")
    right.set(xlabel="pixel distance of a prompt's two pictures (diversity)", ylabel="DINO (subject)")
    left.legend(fontsize=8)
    return plot, (left, right)


if __name__ == "__main__":
    main()
