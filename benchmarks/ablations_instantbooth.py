"""InstantBooth's Tables 3 and 4 (arXiv 2304.03411) on the toy world: `make ablations-instantbooth`.

    python -m benchmarks.ablations_instantbooth [--out runs/ablations_instantbooth] [--steps 600] [--subjects 50]

Table 3: what each part is good for, every setting trained equally long. Table 4: beta and alpha in sampling. Scored on
held-out subjects under held-out prompts, with one reference. What is finished is kept; a training that was stopped goes
on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from rich.console import Console

from benchmarks.ablations import draw_data, folder_of, train
from benchmarks.sweep import brackets
from pig.commands.generate import cut_out_all, draw_jobs
from pig.data.subjects import read_subjects
from pig.demo import held_out_jobs, toy_scorer
from pig.methods import load_pipeline

CONFIG = "configs/instantbooth/toyworld.yaml"
SETTING = {"text_guidance": 1.5, "num_inference_steps": 20}
# Row of Table 3 -> what `fit` is told, and the paper's align / reconstruct.
SETTINGS: dict[str, tuple[list[str], str]] = {
    "full": ([], ".3140 / .7329"),
    "without train mask": (["--data.augmentation.background=own"], ".3127 / .7485"),
    "without patch feature": (["--model.patch_feature=false"], ".3269 / .6494"),
    "without adapter": (["--model.lr_adapters=0"], ".3242 / .5468"),
    "before the text encoder": (["--model.before_text=true"], ".3127 / .7495"),
    "tuned CLIP encoder": (["--model.lr_vision=1e-4", "--model.tuned_vision_layers=2"], ".3266 / .6425"),
    "tuned UNet": (["--model.lr_unet=1e-4"], ".3142 / .7265"),
}
# (beta, alpha) -> the paper's.
PLANE = {
    (0.3, 0.1): ".3242 / .6631",
    (0.3, 0.3): ".3232 / .7002",
    (0.3, 0.4): ".3140 / .7329",
    (0.3, 0.5): ".3032 / .7544",
    (0.3, 1.0): ".2087 / .7905",
    (0.5, 0.1): ".3127 / .7051",
    (0.5, 0.3): ".3076 / .7480",
    (0.5, 0.5): ".2874 / .7778",
    (1.0, 1.0): ".2017 / .7944",
}
console = Console(soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations_instantbooth"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--subjects", type=int, default=50)
    chosen = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    out: Path = chosen.out
    console.print(
        f"{len(SETTINGS)} trainings of {chosen.steps} steps, then {len(SETTINGS) + len(PLANE)} sets of images"
    )
    draw_data(out / "data", chosen.subjects)
    for name, (told, _) in SETTINGS.items():
        train(folder_of(out, name, 0), CONFIG, told, 0, chosen.steps)
    subjects = read_subjects(out / "data/subjects")
    jobs, scorer, cutouts = held_out_jobs(subjects, (0,)), toy_scorer(out / "eval"), cut_out_all(subjects, 1)

    def score(name: str, folder: Path, **settings: Any) -> dict[str, list[float]]:
        draw_jobs(
            load_pipeline(folder_of(out, name, 0) / "export"), jobs, cutouts, folder, SETTING | settings, batch_size=12
        )
        return scorer.score(folder, subjects).per_subject()

    found = {name: score(name, folder_of(out, name, 0) / "images") for name in SETTINGS}
    plane = {
        (beta, alpha): score("full", out / f"plane/{beta:g}_{alpha:g}", beta=beta, alpha=alpha) for beta, alpha in PLANE
    }
    lines = ["| Table 3 | CLIP-T | CLIP-I | DINO | paper: align / reconstruct |", "|---|---|---|---|---|"]
    lines += [row(name, found[name], SETTINGS[name][1]) for name in SETTINGS]
    lines += ["", "| beta, alpha | CLIP-T | CLIP-I | DINO | paper: align / reconstruct |", "|---|---|---|---|---|"]
    lines += [row(f"{beta:g}, {alpha:g}", plane[beta, alpha], PLANE[beta, alpha]) for beta, alpha in PLANE]
    (out / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    told = {**found, **{f"{beta:g} {alpha:g}": scores for (beta, alpha), scores in plane.items()}}
    (out / "ablations.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    console.print(f"{out / 'ablations.md'}, {out / 'ablations.json'}")


def row(name: str, scores: dict[str, list[float]], paper: str) -> str:
    cells = [f"{fmean(scores[one]):.3f} {brackets(scores[one])}" for one in ("clip_t", "clip_i", "dino")]
    return "| " + " | ".join([name, *cells, paper]) + " |"


if __name__ == "__main__":
    main()
