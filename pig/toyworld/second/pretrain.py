"""Train the second edition's models, as `pig.toyworld.pretrain` trains the first's.

    python -m pig.toyworld.second.pretrain vae|clip|vision|dino|sam|unet --out DIR --work DIR [--start DIR]

`sam` needs `vae`, `vision` needs `clip`, and `unet` needs `vae` and `clip`; its report needs `vision`. A stage that was
stopped goes on from its last checkpoint in `--work`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pig.toyworld.pretrain import train
from pig.toyworld.second.stages.clip import CLIPStage, VisionStage
from pig.toyworld.second.stages.dino import DINOStage
from pig.toyworld.second.stages.sam import SAMStage
from pig.toyworld.second.stages.unet import UNetStage
from pig.toyworld.second.stages.vae import VAEStage
from pig.toyworld.stages.base import Stage

STAGES = ("vae", "clip", "vision", "dino", "sam", "unet")


def make_stage(name: str, out: Path, work: Path) -> Stage:
    if name == "unet":
        return UNetStage(out / "base", work)
    if name == "sam":
        return SAMStage(out / "base")
    if name == "vision":
        return VisionStage(out / "clip")
    return {"vae": VAEStage, "clip": CLIPStage, "dino": DINOStage}[name]()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pig.toyworld.second.pretrain", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints of unfinished stages")
    parser.add_argument("--start", type=Path, help="an earlier edition's weights to begin from (by default: nothing)")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    stage = make_stage(chosen.stage, chosen.out, chosen.work)
    if chosen.start:
        stage.begin_from(chosen.start)
    train(stage, chosen.stage, chosen.out, chosen.work)


if __name__ == "__main__":
    main()
