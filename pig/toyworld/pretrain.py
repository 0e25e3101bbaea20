"""Train the toy world's small models from nothing, in the formats of the big ones.

    python -m pig.toyworld.pretrain vae|clip|vision|dino|sam|unet [--out DIR] [--work DIR]

Each stage is a LightningModule with its settings at the top of the class; a stage that was stopped goes on from its
last checkpoint in `--work`. `clip` also makes the tokenizer; `sam` needs `vae`, `vision` needs `clip`, and `unet` needs
`vae` and `clip`; its report needs `vision`. They leave `base/` (a Stable Diffusion folder), `clip/`, `dino/` and `sam/`
in `--out`, loaded as the hub's models are. `make toyworld-weights` does all, and trains the methods' deltas on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger

from pig.models.backbone import fast_precision
from pig.toyworld.stages.base import Stage
from pig.toyworld.stages.clip import CLIPStage, VisionStage
from pig.toyworld.stages.dino import DINOStage
from pig.toyworld.stages.sam import SAMStage
from pig.toyworld.stages.unet import UNetStage
from pig.toyworld.stages.vae import VAEStage
from pig.training.checkpoints import WholeCheckpoints


def make_stage(name: str, out: Path, work: Path) -> Stage:
    if name == "unet":
        return UNetStage(out / "base", work)
    if name == "sam":
        return SAMStage(out / "base")
    if name == "vision":
        return VisionStage(out / "clip")
    return {"vae": VAEStage, "clip": CLIPStage, "dino": DINOStage}[name]()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pig.toyworld.pretrain", description=__doc__)
    parser.add_argument("stage", choices=("vae", "clip", "vision", "dino", "sam", "unet"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--work", type=Path, default=Path("runs/toyworld"), help="checkpoints of unfinished stages")
    args = parser.parse_args()

    torch.manual_seed(0)
    train(make_stage(args.stage, args.out, args.work), args.stage, args.out, args.work)


def train(stage: Stage, name: str, out: Path, work: Path) -> None:
    """Run a stage, from its last checkpoint in `work` if there is one, and write what it has learnt into `out`."""
    last = work / name / "last.ckpt"
    trainer = Trainer(
        max_steps=stage.steps,
        precision=fast_precision(),
        gradient_clip_val=1.0,
        logger=CSVLogger(work, name=name),
        plugins=[WholeCheckpoints()],
        accelerator="auto",
        devices=1,
        callbacks=[
            EMAWeightAveraging(decay=stage.ema),
            ModelCheckpoint(last.parent, every_n_train_steps=250, save_last=True, save_top_k=0),
            RichProgressBar(refresh_rate=20),
        ],
    )
    trainer.fit(stage, ckpt_path=last if last.exists() else None, weights_only=True)
    stage.eval().cpu().save(out)


if __name__ == "__main__":
    main()
