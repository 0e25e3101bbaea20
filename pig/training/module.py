"""What every method's LightningModule is: frozen base parts, trained groups, checkpoints, validation, prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar, cast, get_args

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Tensor, nn

from pig.data.images import Job
from pig.data.schema import Batch
from pig.errors import InputError, check_named
from pig.models.backbone import encode_images, encode_text, encoders_digest, half_is_fast, inputs_told, load_backbone
from pig.models.compiled import compile_blocks
from pig.sampling.pipeline import SubjectPipeline
from pig.training.checkpoints import WholeCheckpoints
from pig.training.optimizers import OptimizerName, Schedule, adamw, lay_out
from pig.training.step import MicroBatchedModule

P = TypeVar("P", bound=SubjectPipeline)
PRECISIONS = ("bf16-mixed", "32-true")  # no loss scaling, so that gradients say at once whether they are finite


class Network(Protocol):
    """What a method trains: group -> name in this network -> parameter."""

    def trainable_parameters(self) -> dict[str, dict[str, nn.Parameter]]: ...


class PersonalisationModule(MicroBatchedModule):
    """Base of the methods' modules.

    A method's constructor makes `self.net` on the base model's parts, calls `train_only`, and fills `self.dropout`; the
    method defines `losses` and `pipeline`. Every random draw of `losses` comes from `diffusion.draw(batch.seeds, ...)`,
    which makes runs resumable to the bit. Checkpoints hold the trainable weights and nothing of the frozen parts, which
    come from the base model's folder.

    Args:
        base: the Stable Diffusion 1.x / 2.x checkpoint: a folder, a hub id, or `toyworld`.
        optimizer: see `adamw`.
        micro_batch: see `MicroBatchedModule`.
    """

    method: ClassVar[str]  # its name in the registry
    alphas_cumprod: Tensor
    net: nn.Module  # a Network
    own_settings: Mapping[str, Any]  # what the method's pipeline takes where none is named

    def __init__(self, base: str, optimizer: OptimizerName, micro_batch: int | None) -> None:
        super().__init__(micro_batch)
        check_named("model.optimizer", optimizer, get_args(OptimizerName))
        self.optimizer_name = optimizer
        self.groups: dict[str, list[str]] = {}
        self.schedule: Schedule = "constant"
        self.learning_rates: dict[str, float] = {}
        self.dropout: dict[str, float] = {}  # probabilities by which parts of a sample are left out in training
        self.base, self.backbone = base, load_backbone(base)
        self.vae, self.text_encoder = self.backbone.vae, self.backbone.text_encoder
        alphas_cumprod = self.backbone.scheduler.alphas_cumprod
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)
        self.train_timesteps = len(alphas_cumprod)
        self._empty_text: Tensor | None = None

    def arrange(self, *, gradient_checkpointing: bool, compile: bool) -> None:
        """Make `self.net` ready for training; see `compile_blocks`."""
        self.net.train()  # `from_pretrained` leaves modules in eval mode
        network: Any = self.net
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if compile:
            compile_blocks(network, leave_out=getattr(network, "interrupted_blocks", list)())

    def pipeline(self) -> SubjectPipeline:
        """The sampling pipeline on this module's own parts: not copied, not rebuilt."""
        raise NotImplementedError

    def pipeline_of(self, kind: Callable[..., P], **own: Any) -> P:
        """A pipeline on the parts that all methods have; own: its further arguments."""
        pipeline = kind(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.backbone.tokenizer,
            scheduler=copy.deepcopy(self.backbone.scheduler),
            base=self.base,
            settings=self.own_settings,
            network=self.net,
            **own,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def trainable_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """What may be trained: group -> name of the parameter in this module -> parameter."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups = cast(Network, self.net).trainable_parameters()
        return {group: {names[id(one)]: one for one in of.values()} for group, of in groups.items()}

    def train_only(self, learning_rates: Mapping[str, float], schedule: Schedule) -> None:
        """Train the `trainable_groups` at these rates and freeze all else; a group with rate 0 is frozen too."""
        if not all(math.isfinite(rate) and rate >= 0 for rate in learning_rates.values()) or not any(
            learning_rates.values()
        ):
            raise InputError(f"learning rates must be at least 0, and one above it, got {dict(learning_rates)}")
        groups = self.trainable_groups()
        self.requires_grad_(False)
        self.learning_rates = {group: rate for group, rate in learning_rates.items() if rate > 0}
        self.groups = {group: list(groups[group]) for group in self.learning_rates}
        for group in self.groups:
            for parameter in groups[group].values():
                parameter.requires_grad_(True)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        """AdamW with one learning rate for each group."""
        parameters = self.trainable()
        groups = [
            {"name": group, "params": [parameters[name] for name in names], "lr": self.learning_rates[group]}
            for group, names in self.groups.items()
        ]
        optimizer = adamw(self.optimizer_name, groups)
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)

        def cosine(step: int) -> float:
            return min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        kept = self.trainable()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in kept}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trainable weights.

        Raises:
            InputError: the names or shapes differ from those of the trainable weights; a number is not finite.
        """
        wanted, given = set(self.trainable()), set(state_dict)
        if wanted != given:
            raise InputError(
                f"the checkpoint's weights are not this model's: {len(wanted - given)} missing "
                f"{sorted(wanted - given)[:3]}, {len(given - wanted)} unknown {sorted(given - wanted)[:3]}"
            )
        for name, parameter in self.trainable().items():
            if parameter.shape != state_dict[name].shape:
                raise InputError(
                    f"{name}: the checkpoint has shape {tuple(state_dict[name].shape)}, the base model "
                    f"{tuple(parameter.shape)}: it was trained on another base model"
                )
            if not state_dict[name].isfinite().all():
                raise InputError(
                    f"the checkpoint's {name} holds numbers that are not finite (NaN): go on from an earlier one, with "
                    "lower learning rates"
                )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["pig_method"] = self.method
        checkpoint["pig_optimizer"] = self.optimizer_name
        checkpoint["pig_skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("pig_optimizer", self.optimizer_name)
        if (saved == "adamw_8bit") != (self.optimizer_name == "adamw_8bit"):
            raise InputError(
                f"the checkpoint holds the state of model.optimizer={saved}, which {self.optimizer_name} cannot go on "
                "with: resume with the same one"
            )
        self.skipped_steps = checkpoint.get("pig_skipped_steps", 0)

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpoints()
        _ = self.encoders_digest  # of the weights as loaded, before any is rounded
        data = self.trainer.datamodule
        for encoded in data.encoded() if data else ():
            self.check_encoded(encoded and encoded["base"])
        if self.trainer.precision not in PRECISIONS:
            raise InputError(
                f"trainer.precision={self.trainer.precision} is not supported: use {' or '.join(PRECISIONS)}"
            )
        device = self.trainer.strategy.root_device.type
        if self.trainer.precision == "bf16-mixed" and not half_is_fast(device):
            rank_zero_warn(
                "this CPU has no instructions for bfloat16: --trainer.precision 32-true is many times faster"
            )
        lay_out(self, self.trainer.precision, self.trainer.strategy.root_device)

    def on_train_start(self) -> None:
        super().on_train_start()
        rank_zero_info(self.parameters_told())
        rank_zero_info(self.inputs_told())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write `last.ckpt` again at the end. (Lightning leaves that of the last full `every_n_train_steps`: of step
        300 where 390 were trained and each 100th is kept.)"""
        super().on_train_batch_end(outputs, batch, batch_idx)
        trainer = self.trainer
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.global_step == trainer.max_steps or trainer.should_stop or (trainer.is_last_batch and last_epoch):
            for keep in trainer.checkpoint_callbacks:
                # Without a path there was none before: Lightning writes its first one when training has ended.
                last = keep.last_model_path if isinstance(keep, ModelCheckpoint) else ""
                if last and keep._last_global_step_saved != trainer.global_step:
                    trainer.save_checkpoint(last, keep.save_weights_only)

    def parameters_told(self) -> str:
        """What is trained, in words."""
        parameters = dict(self.named_parameters())
        total = sum(parameter.numel() for parameter in parameters.values())
        sizes = {group: sum(parameters[name].numel() for name in names) for group, names in self.groups.items()}
        groups = [f"{group} ({size / 1e6:.3g} M, rate {self.learning_rates[group]:g})" for group, size in sizes.items()]
        return f"training {', '.join(groups)}; {total / 1e6:.3g} M parameters in all"

    def inputs_told(self) -> str:
        """What encoding the inputs of the training costs, in words."""
        data = self.trainer.train_dataloader.dataset
        return inputs_told(self.backbone, data.resolution, data.encoded)

    # -- validation, test, predict ------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Compiled blocks are for training steps: other graphs, other sizes would be compiled for a few passes."""
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        torch.compiler.set_stance("default")

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss on held-out samples: same noise and timesteps at every validation, nothing dropped."""
        self.log_by_timestep("val", *self._whole_losses(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log_by_timestep("test", *self._whole_losses(batch))

    def _whole_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        found = [self.losses(part, training=False) for part in self.micro_batches(batch)]
        loss, t = (torch.cat(column) for column in zip(*found, strict=True))
        return loss, t

    def predict_step(self, job: Job, batch_idx: int) -> Image.Image:
        """Draw a subject under a prompt, from all its pictures, with the method's own sampling."""
        generator = torch.Generator().manual_seed(job.seed)
        given: dict[str, Any] = {"class_noun": job.subject.class_noun, "generator": generator}
        return self.pipeline()(job.prompt, job.subject.references(), **given).images[0]

    # -- what the frozen parts make of a batch ------------------------------------------------------------------------

    @cached_property
    def encoders_digest(self) -> str:
        return encoders_digest(self.backbone)

    def check_encoded(self, by: str | None) -> None:
        """Refuse shards that another base model has encoded (its digest; None: not encoded)."""
        if by not in (None, self.encoders_digest):
            raise InputError(
                f"these shards were encoded by another base model ({by[:12]}) than {self.base!r} "
                f"({self.encoders_digest[:12]}): train on that one, or encode the triplets again"
            )

    def encode_pictures(self, target: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 and z_ref_0, (B, 4, h, w) and (B', K, 4, h, w), by one pass of the VAE where both come as pixels."""
        pictures = (target, reference.flatten(0, 1))
        if target.shape[1:] == reference.shape[2:]:
            z_0, z_ref_0 = encode_images(self.vae, torch.cat(pictures)).float().split([len(one) for one in pictures])
        else:
            z_0, z_ref_0 = (encode_images(self.vae, one).float() for one in pictures)
        return z_0, z_ref_0.unflatten(0, reference.shape[:2])

    def encode_captions(self, batch: Batch, *more: Sequence[str]) -> tuple[Tensor, ...]:
        """Embeddings of the captions, (B, L, D), of the empty caption, (1, L, D), and of each list of other texts; each
        text is encoded once, and the captions of encoded shards not at all."""
        if self._empty_text is None or self._empty_text.device != self.device:
            self._empty_text = encode_text(self.backbone, [""])
        known = {} if batch.text is None else dict(zip(batch.captions, batch.text, strict=True))
        wanted = [text for texts in (batch.captions, *more) for text in texts]
        if missing := [text for text in dict.fromkeys(wanted) if text not in known]:
            known.update(zip(missing, encode_text(self.backbone, missing), strict=True))
        text, *others = (torch.stack([known[text] for text in texts]) for texts in (batch.captions, *more))
        return text, self._empty_text, *others
