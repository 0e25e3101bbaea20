"""The paper's Table 2 and Fig. 7 (BootPIG, arXiv 2401.13974) on the toy world: `make ablations`.

    python -m benchmarks.ablations [--out runs/ablations] [--steps 400] [--subjects 50]

Table 2: which part is trained. Fig. 7: how many references. Every setting is trained equally long, with two seeds of
training, and scored on held-out subjects under held-out prompts, two images each. What is finished is kept; a training
that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import transformers
from rich.console import Console

from benchmarks.sweep import USUAL, brackets
from data_gen.toyworld import draw_subjects, draw_triplets
from pig.commands.drawing import draw_jobs
from pig.commands.generate import cut_out_all
from pig.data.subjects import read_subjects
from pig.demo import PRECISION, held_out_jobs, toy_scorer
from pig.methods import load_pipeline
from pig.methods.bootpig import BootPIG
from pig.sampling.pipeline import SubjectPipeline
from pig.toyworld import scene

CONFIG = "configs/bootpig/toyworld.yaml"
TRAINING_SEEDS, IMAGE_SEEDS, TRIPLETS = (0, 1), (0, 1), 8000
# Row of Table 2 -> what `fit` is told. In the paper's order.
SETTINGS: dict[str, list[str] | None] = {
    "nothing trained": None,
    "Reference UNet only": ["--model.lr_rsa=0"],
    "RSA only": ["--model.lr_reference=0"],
    "both, no augmentation": ["--data.augmentation.scale=[1,1]", "--data.augmentation.flip=0"],
    "both": [],
}
# Not in the paper: why the Reference UNet alone does so well here.
CAUSES: dict[str, list[str] | None] = {
    "Reference UNet only, a tenth of the rate": ["--model.lr_rsa=0", "--model.lr_reference=5e-5"]
}
# CLIP-T, CLIP-I, DINO of the paper's Table 2 (x 100); it does not print the first row.
PAPER = {
    "Reference UNet only": "30.6 / 72.8 / 43.8",
    "RSA only": "30.9 / 78.2 / 64.9",
    "both, no augmentation": "30.2 / 78.8 / 67.0",
    "both": "31.1 / 79.7 / 67.4",
}
Found = dict[str, dict[str, list[float]]]  # row -> score -> value of each subject, the mean over training seeds
console = Console(soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--subjects", type=int, default=50)
    chosen = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    out: Path = chosen.out
    trainings = [
        (name, seed) for name, told in (SETTINGS | CAUSES).items() if told is not None for seed in TRAINING_SEEDS
    ]
    console.print(f"{len(trainings)} trainings of {chosen.steps} steps, then {len(trainings) + 7} sets of images")
    draw_data(out / "data", chosen.subjects)
    for number, (name, seed) in enumerate(trainings):
        began = time.perf_counter()
        if train(folder_of(out, name, seed), CONFIG, (SETTINGS | CAUSES)[name] or [], seed, chosen.steps):
            took = (time.perf_counter() - began) / 60
            console.print(f"{name}, seed {seed}: {took:.1f} minutes; {len(trainings) - number - 1} trainings to go")
    found = score_all(out)
    (out / "ablations.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (out / "ablations.md").write_text(markdown(found), encoding="utf-8")
    console.print(f"{out / 'ablations.md'}, {out / 'ablations.json'}")


def draw_data(data: Path, subjects: int) -> None:
    draw_triplets(data / "triplets", TRIPLETS, 64)
    draw_triplets(data / "val", 64, 64, first_seed=scene.HELD_OUT_SEED + 10**8)
    draw_subjects(data / "subjects", subjects, 64)


def folder_of(out: Path, name: str, seed: int) -> Path:
    return out / name.replace(" ", "_").replace(",", "") / str(seed)


def train(run: Path, config: str, told: Sequence[str], seed: int, steps: int) -> bool:
    """Train and export a setting as a user would; False where that was done before.

    run: its folder, in the second folder above which the data are.
    """
    if (run / "export/model_index.json").exists():
        return False
    last = run / "fit/checkpoints/last.ckpt"
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "data").exists():  # where the config looks
        (run / "data").symlink_to((run.parents[1] / "data").resolve())
    words = [
        f"--config={config}",
        f"--run={run}",
        f"--data.seed={seed}",
        f"--trainer.max_steps={steps}",
        f"--trainer.precision={PRECISION}",
        "--trainer.limit_val_batches=0",
        *told,
        *([f"--ckpt_path={last}"] if last.exists() else []),
    ]
    subprocess.run([sys.executable, "-m", "pig.cli", "fit", *words], check=True)
    export = ["export", f"--checkpoint={last}", f"--out={run / 'export'}"]
    subprocess.run([sys.executable, "-m", "pig.cli", *export], check=True)
    return True


def score_all(out: Path) -> Found:
    subjects = read_subjects(out / "data/subjects")
    jobs = held_out_jobs(subjects, IMAGE_SEEDS)
    scorer = toy_scorer(out / "eval")

    def score(pipeline: SubjectPipeline, references: int, folder: Path) -> dict[str, list[float]]:
        cutouts = cut_out_all(subjects, references)
        draw_jobs(pipeline, jobs, cutouts, folder, USUAL, batch_size=12)
        return scorer.score(folder, subjects).per_subject()

    def over_seeds(name: str, references: int) -> dict[str, list[float]]:
        each = []
        for seed in TRAINING_SEEDS:
            run = folder_of(out, name, seed)
            pipeline = load_pipeline(run / "export")
            each.append(score(pipeline, references, run / f"images_{references}"))
        return {name: [fmean(pair) for pair in zip(*(one[name] for one in each), strict=True)] for name in each[0]}

    found: Found = {}
    for name, told in (SETTINGS | CAUSES).items():
        if told is None:
            found[name] = score(BootPIG("toyworld").pipeline(), 1, out / "nothing_trained/images_1")
        else:
            found[name] = over_seeds(name, 1)
        console.print(f"{name}: DINO {fmean(found[name]['dino']):.3f}")
    for references in (2, 3, 4):
        found[f"both, {references} references"] = over_seeds("both", references)
    return found


def markdown(found: Found) -> str:
    """Both tables; differences are to `both` with one reference, paired by subject."""

    def row(name: str, label: str, more: list[str]) -> str:
        scores = found[name]
        cells = [f"{fmean(scores[one]):.3f} {brackets(scores[one])}" for one in ("clip_t", "clip_i", "dino")]
        gaps = [a - b for a, b in zip(scores["dino"], found["both"]["dino"], strict=True)]
        gap = "" if name == "both" else f"{fmean(gaps):+.3f} {brackets(gaps, '+.3f')}"
        return "| " + " | ".join([label, *cells, gap, *more]) + " |"

    head = "| {} | CLIP-T | CLIP-I | DINO | DINO against both |{}\n|---|---|---|---|---|{}"
    lines = [head.format("trained", " paper: CLIP-T / CLIP-I / DINO |", "---|")]
    lines += [row(name, name, [PAPER.get(name, "")]) for name in SETTINGS]
    lines += ["", head.format("references", "", "")]
    lines += [row("both", "1", [])]
    lines += [row(f"both, {count} references", str(count), []) for count in (2, 3, 4)]
    lines += ["", head.format("looking for a cause", "", "")]
    lines += [row(name, name, []) for name in CAUSES]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
