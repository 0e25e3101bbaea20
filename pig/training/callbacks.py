"""Lightning callbacks: EMA of the trainable weights, scores and samples at validation, images of `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from pig.data.grids import grid
from pig.data.images import Job, save_generated
from pig.data.subjects import SubjectFolder, read_subjects
from pig.data.transforms import load_image
from pig.errors import InputError
from pig.evaluation.metrics import SubjectScores
from pig.models.encoders import load_clip, load_dino
from pig.training.module import PersonalisationModule


class EMA(Callback):
    """Keep a moving average of the trainable weights: ema <- decay ema + (1 - decay) weights, after each step.

    Validation, test, predict and `export` use the average; training goes on with the weights themselves. (Lightning's
    own EMAWeightAveraging copies the frozen parts too, and puts them into every checkpoint.)
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise InputError(f"EMA decay must lie between 0 and 1, got {decay}")
        self.decay, self.average, self.step = decay, dict[str, Tensor](), 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = _trainable(pl_module)
        kept = self.average
        self.average = {
            name: kept[name].to(weight.device) if name in kept else weight.detach().clone()
            for name, weight in weights.items()
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # in the middle of an accumulation
            return
        self.step = trainer.global_step
        weights = _trainable(pl_module)
        torch._foreach_lerp_(
            list(self.average.values()), [weights[name].detach() for name in self.average], 1 - self.decay
        )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _swap(self, pl_module: LightningModule) -> None:
        weights = _trainable(pl_module)
        for name, average in self.average.items():
            current = weights[name].detach().clone()
            weights[name].data.copy_(average)
            average.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.step = dict(state["average"]), state["step"]


def _trainable(pl_module: LightningModule) -> dict[str, torch.nn.Parameter]:
    assert isinstance(pl_module, PersonalisationModule)
    return pl_module.trainable()


class SubjectSamples(Callback):
    """At each validation: draw held-out subjects, log CLIP-T, CLIP-I and DINO, and save a grid of samples.

    `val/selection` is the geometric mean of DINO and CLIP-T (0 where one is negative), by which the best checkpoint is
    chosen: one per cent more of either counts the same, whatever their ranges. CLIP-I is left out, as it rises with the
    background too. The networks live here, in no checkpoint and no optimizer, on the device that trains.

    Args:
        subjects: a folder of subjects (`pig.data.subjects`).
        clip, dino: as in `load_clip` and `load_dino`.
        max_subjects: how many of the subjects are drawn, one image each, prompts in turn.
        references: pictures given for each.
        steps: of the sampling; its guidance is the model's own.
    """

    def __init__(
        self,
        subjects: str,
        clip: str,
        dino: str,
        max_subjects: int = 8,
        references: int = 1,
        steps: int = 20,
    ) -> None:
        self.folder, self.clip_name, self.dino_name = subjects, clip, dino
        self.max_subjects, self.references = max_subjects, references
        self.steps = steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate") or trainer.limit_val_batches == 0:
            return
        self.subjects: list[SubjectFolder] = read_subjects(self.folder)[: self.max_subjects]
        device = trainer.strategy.root_device
        self.clip, self.dino = load_clip(self.clip_name, device), load_dino(self.dino_name, device)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PersonalisationModule)
        pipeline, scores, rows = pl_module.pipeline(), SubjectScores(len(self.subjects), self.clip, self.dino), []
        # Every rank draws its share; the metrics are summed over ranks.
        for index in range(trainer.global_rank, len(self.subjects), trainer.world_size):
            subject = self.subjects[index]
            job = Job(subject, index % len(subject.prompts), seed=index)
            references = subject.references(self.references)
            generator = torch.Generator().manual_seed(job.seed)
            with trainer.precision_plugin.forward_context():
                image = pipeline(
                    job.prompt,
                    references,
                    class_noun=subject.class_noun,
                    generator=generator,
                    num_inference_steps=self.steps,
                ).images[0]
            real = [load_image(path) for path in subject.images]
            scores.update(index, [image], [job.prompt], real)
            rows.append([*references, image])
        found = {name: metric.to(pl_module.device).compute() for name, metric in scores.metrics.items()}
        found["selection"] = (found["dino"].clamp(min=0) * found["clip_t"].clamp(min=0)).sqrt()
        for name, value in found.items():
            pl_module.log(f"val/{name}", value, rank_zero_only=trainer.world_size == 1)
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        if rows:  # a rank may have no subject to draw
            sheet = grid(rows, size=128)
            sheet.save(folder / f"step-{trainer.global_step:06d}-rank{trainer.global_rank}.png")


class ProgressBar(RichProgressBar):
    """Shows what the module has fetched for it (`PersonalisationModule.shown`), so that no step waits for the GPU."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {**super().get_metrics(trainer, pl_module), **getattr(pl_module, "shown", {})}
        metrics.pop("v_num", None)  # the number of the log's folder
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        """Without the last epoch's number, which is -2 where steps end the run."""
        return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"


class SaveImages(Callback):
    """Save what `predict` draws into a folder in the contract of `pig.data.images`, as it comes."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Job, batch_idx: int, *_: Any
    ) -> None:
        assert isinstance(pl_module, PersonalisationModule)
        save_generated(self.folder, batch, outputs, method=pl_module.method, settings={})
