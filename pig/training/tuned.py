"""The shared base of the methods that are tuned on one subject."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor

from pig.costs import flops_of
from pig.data.images import save_picture
from pig.data.schema import Batch
from pig.data.subject_training import ClassPictures, SubjectDataModule, SubjectDataset, class_prompt
from pig.data.transforms import is_whole
from pig.errors import InputError
from pig.files import locked, make_folder, read_json, replacing_folder, write_text
from pig.models.backbone import base_digest, encode_images, encode_text, half_on, load_backbone
from pig.sampling.delta import save_delta, step_folder
from pig.sampling.text import TextPipeline
from pig.training.module import PersonalisationModule
from pig.training.optimizers import OptimizerName

TOLD = "class.json"  # beside the class pictures
TOGETHER = 8  # class pictures that are drawn at a time; a fixed number, since a picture's rounding depends on it


class TunedModule(PersonalisationModule):
    """Base of the modules that are tuned on one subject (`SubjectDataModule`).

    Each picture is encoded once, before the first step; a text at its first use, where the text encoder is frozen. Each
    is encoded alone, so its encoding does not depend on the rest of a batch.

    The trained weights are saved as a delta at some of the steps, and always at the last one: `step-000250/` in the
    trainer's `default_root_dir`.

    Args:
        base, optimizer, micro_batch: see `PersonalisationModule`.
        save_at: the steps at which the weights are saved. save_half: in float16, half the space; the pictures differ by
            rounding.
    """

    def __init__(
        self,
        base: str,
        optimizer: OptimizerName,
        micro_batch: int | None,
        *,
        save_at: Sequence[int],
        save_half: bool,
    ) -> None:
        super().__init__(base, optimizer, micro_batch)
        if any(step < 1 for step in save_at):
            raise InputError(f"model.save_at: steps count from 1, got {list(save_at)}")
        self.save_at, self.save_half = sorted(set(save_at)), save_half
        self._origin = ""  # the base model's digest
        self._kept = 0  # the last step that is saved
        self._latents: dict[str, Tensor] = {}
        self._texts: dict[tuple[str, torch.device], Tensor] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.check(self.trainer, self.trainer.datamodule)
            self._origin = self._origin or base_digest(load_backbone(self.base))

    def check(self, trainer: Trainer, data: Any) -> None:
        """
        Raises:
            InputError: the method cannot be tuned so.
        """
        if not isinstance(data, SubjectDataModule):
            raise InputError(f"{self.method} is tuned on one subject: set data to SubjectDataModule")
        self.kept_steps(trainer)

    def on_fit_start(self) -> None:
        data: SubjectDataModule = self.trainer.datamodule
        if data.prior is not None:
            if self.trainer.is_global_zero:
                noun, settings = data.subject.class_noun, self.own_settings
                draw_class_pictures(self.base, self._origin, noun, data.prior, settings, self.device)
            self.trainer.strategy.barrier()
        dataset: SubjectDataset = data.train_dataloader().dataset
        for key, picture in dataset.pictures.items():
            pixels = picture[None].to(self.device).float() / 127.5 - 1
            self._latents[key] = encode_images(self.vae, pixels).float()

    def kept_steps(self, trainer: Trainer) -> list[int]:
        """The steps at which a run saves its weights.

        Raises:
            InputError: one of them lies behind the run's end.
        """
        last = trainer.max_steps
        if last < 1:
            raise InputError("trainer.max_steps says how long a subject is tuned: set it")
        if self.save_at and self.save_at[-1] > last:
            raise InputError(f"model.save_at: step {self.save_at[-1]} lies behind trainer.max_steps={last}")
        return sorted({*self.save_at, last})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The delta of a step is there before its checkpoint is: a run that goes on behind it would never write it."""
        super().on_save_checkpoint(checkpoint)
        self._keep()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._keep()

    def _keep(self) -> None:
        step = self.trainer.global_step
        if step == self._kept or step not in self.kept_steps(self.trainer) or not self.trainer.is_global_zero:
            return
        folder = step_folder(Path(self.trainer.default_root_dir), step)
        make_folder(folder.parent)
        with replacing_folder(folder) as aside:
            save_delta(self.pipeline(), aside, half=self.save_half, origin=self._origin)
        self._kept = step

    def inputs_told(self) -> str:
        return f"{len(self._latents)} pictures, encoded once"

    def latents_of(self, batch: Batch) -> Tensor:
        """z_0, (B, 4, h, w)."""
        if all(key in self._latents for key in batch.keys):
            return torch.cat([self._latents[key] for key in batch.keys])
        return encode_images(self.vae, batch.target).float()

    def encode_once(self, texts: Sequence[str]) -> Tensor:
        """(B, L, D), by the frozen text encoder."""
        for text in texts:
            if (text, self.device) not in self._texts:
                self._texts[text, self.device] = encode_text(self.backbone, [text])
        return torch.cat([self._texts[text, self.device] for text in texts])


def draw_class_pictures(
    base: str, digest: str, noun: str, wanted: ClassPictures, settings: Mapping[str, Any], device: torch.device
) -> None:
    """Draw the pictures of a class that are not there yet, by the base model as it is. One process draws at a time.
    `class.json` beside them says how they were drawn and what all of them cost: FLOPs and seconds.

    digest: of the base model. settings: those of the model in tuning; its guidance is taken.

    Raises:
        InputError: the folder holds pictures by another base model, or other settings.
    """
    folder = wanted.of(noun)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True):
        missing = [number for number, file in enumerate(wanted.files(noun)) if not is_whole(file)]
        how = {
            "prompt": class_prompt(noun),
            "steps": wanted.steps,
            "text_guidance": settings.get("text_guidance"),
            "base_digest": digest,
        }
        _claim(folder, how, base)
        starts = sorted({number // TOGETHER * TOGETHER for number in missing})
        if not starts:
            return
        backbone = load_backbone(base)  # the module's own is tuned already where a run goes on
        rank_zero_info(f"{noun}: {len(missing)} class pictures to draw, into {folder}")
        own = {name: value for name, value in settings.items() if name == "text_guidance"}
        pipeline = TextPipeline.from_backbone(backbone, base=base, settings=own).to(device, half_on(device.type))
        pipeline.set_progress_bar_config(disable=True)

        def draw(numbers: range, steps: int) -> Any:
            generators = [torch.Generator().manual_seed(number) for number in numbers]
            return pipeline(
                class_prompt(noun),
                num_images_per_prompt=len(numbers),
                generator=generators,
                num_inference_steps=steps,
            ).images

        few, more = (flops_of(partial(draw, range(1), steps)) for steps in (1, 2))
        began, count = time.perf_counter(), 0
        for start in track(starts, f"class pictures of {noun}", transient=True):
            numbers = range(start, min(start + TOGETHER, wanted.count))
            count += len(numbers)
            for number, picture in zip(numbers, draw(numbers, wanted.steps), strict=True):
                if number in missing:
                    save_picture(wanted.files(noun)[number], picture)
        cost = {
            "flops": wanted.count * (few + (wanted.steps - 1) * (more - few)),
            "seconds": (time.perf_counter() - began) / count * wanted.count,
        }
        write_text(folder / TOLD, json.dumps({**how, "base": base, **cost}, indent=1) + "\n")


def _claim(folder: Path, how: Mapping[str, Any], base: str) -> None:
    """Refuse a folder whose pictures were drawn with other settings; note the settings in an empty one."""
    told = read_json(folder / TOLD, "") if (folder / TOLD).is_file() else None
    if told is None:
        if any(folder.glob("*.png")):
            raise InputError(f"{folder} holds pictures, but no {TOLD}: give another data.prior.folder, or empty it")
        write_text(folder / TOLD, json.dumps({**how, "base": base}, indent=1) + "\n")
        return
    other = [name for name in how if told.get(name) != how[name]]
    if other:
        raise InputError(
            f"{folder} holds class pictures that were drawn with {other[0]}={told.get(other[0])!r}, now "
            f"{how[other[0]]!r}: give another data.prior.folder"
        )
