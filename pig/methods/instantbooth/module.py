"""InstantBooth (arXiv 2304.03411): train the heads of an image encoder, and adapters in a frozen UNet."""

from __future__ import annotations

from torch import Tensor

from pig import diffusion
from pig.data.schema import Batch
from pig.errors import InputError, check_ranges
from pig.methods.instantbooth.network import Concept, InstantBoothNet, text_with_concept
from pig.methods.instantbooth.pipeline import VISION, InstantBoothPipeline, InstantBoothSettings
from pig.models.backbone import sent
from pig.models.encoders import tokenize
from pig.models.identifier import identifier_token, with_identifier
from pig.models.vision import load_vision, pictures_of, vision_for
from pig.training.module import PersonalisationModule
from pig.training.optimizers import OptimizerName, Schedule
from pig.training.triplets import noised_targets


class InstantBooth(PersonalisationModule):
    """The denoising loss with the identifier before each caption's object (section 3.3), beta = 1.

    Nothing is dropped: the branch without a subject is the base model itself.

    Args:
        base: see `PersonalisationModule`.
        image_encoder: a CLIP's image tower: a folder, a hub id, or `toyworld`; by default OpenAI's ViT-L/14, whose 257
            tokens the paper names (3.2).
        identifier: one token of the vocabulary (4.2).
        lr_heads, lr_adapters: of the fully-connected layers behind the image encoder, and of the adapters (4.2). With
            rate 0 the adapters stay what they are at the start: none (Table 3, "w/o adapter").
        lr_vision, lr_unet: of what is tuned besides (Table 3); at rate 0 it is frozen.
        tuned_vision_layers: for `lr_vision`: so many of the image encoder's last layers.
        patch_feature: adapters see all of CLIP's tokens; else its global feature alone (Table 3, "w/o patch feature").
        before_text: the concept stands among the text encoder's inputs, not its outputs (Table 3).
        schedule: of the learning rates: `constant`, or `cosine` to 0 at the end of the run.
        text_guidance, beta, alpha: what the pipeline takes where none is named.
        gradient_checkpointing: less memory for about a third more time; same gradients.
        compile: the UNet's repeated blocks by `torch.compile`: minutes at the start, for GPUs.
        optimizer, micro_batch: see `PersonalisationModule`.
    """

    method = "instantbooth"
    net: InstantBoothNet

    def __init__(
        self,
        base: str,
        *,
        image_encoder: str | None = None,
        identifier: str = InstantBoothSettings.identifier,
        lr_heads: float = 1e-4,
        lr_adapters: float = 1e-6,
        lr_vision: float = 0.0,
        lr_unet: float = 0.0,
        tuned_vision_layers: int = 1,
        patch_feature: bool = True,
        before_text: bool = False,
        schedule: Schedule = "constant",
        text_guidance: float = InstantBoothSettings.text_guidance,
        beta: float = InstantBoothSettings.beta,
        alpha: float = InstantBoothSettings.alpha,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        optimizer: OptimizerName = "adamw",
        micro_batch: int | None = None,
    ) -> None:
        rates = {"lr_heads": lr_heads, "lr_adapters": lr_adapters, "lr_vision": lr_vision, "lr_unet": lr_unet}
        for name, rate in rates.items():
            check_ranges(**{f"model.{name}": (rate, 0, 1)})
        own = {"identifier": identifier, "text_guidance": text_guidance, "beta": beta, "alpha": alpha}
        InstantBoothSettings.given(own, {})  # a mistake is said now, not at the first validation
        self.own_settings = own
        super().__init__(base, optimizer, micro_batch)
        self.identifier, self.token = identifier, identifier_token(self.backbone.tokenizer, identifier)
        self.save_hyperparameters()
        self.image_encoder = vision_for(base, image_encoder, VISION)
        vision, self.vision_digest = load_vision(self.image_encoder)
        layers = len(vision.vision_model.encoder.layers)
        if not 1 <= tuned_vision_layers <= layers:
            raise InputError(f"model.tuned_vision_layers must be between 1 and {layers}, got {tuned_vision_layers}")
        self.net = InstantBoothNet(
            self.backbone.unet,
            vision,
            Concept.of(self.backbone.unet, vision, patch_feature=patch_feature),
            tuned_vision_layers=tuned_vision_layers if lr_vision > 0 else 0,
            tuned_unet=lr_unet > 0,
        )
        self.before_text = before_text
        self.arrange(gradient_checkpointing=gradient_checkpointing, compile=compile)
        self.train_only({group: rates[f"lr_{group}"] for group in self.trainable_groups()}, schedule)

    def losses(self, batch: Batch, *, training: bool) -> tuple[Tensor, Tensor]:
        """Squared error of each sample, (B,), and its timestep, (B,)."""
        self.check_encoded(batch.encoded_by)
        noised = noised_targets(self, batch, uniforms=0)
        f_c, f_p = self.net.read(pictures_of(batch))
        texts = [self._text_of(*sample) for sample in zip(batch.captions, batch.objects, batch.keys, strict=True)]
        ids = sent(tokenize(self.backbone.tokenizer, texts), self.device)
        text = text_with_concept(self.text_encoder, ids, self.token, f_c, before_text=self.before_text)
        predicted = self.net(noised.z_t.to(self.net.unet.dtype), noised.t, text, f_p)
        return diffusion.loss_per_sample(predicted, noised.target), noised.t

    def _text_of(self, caption: str, noun: str, key: str) -> str:
        try:
            return with_identifier(caption, noun, self.identifier)
        except InputError as error:
            raise InputError(f"sample {key}: {error}. InstantBooth needs captions that name their object") from error

    def setup(self, stage: str) -> None:
        super().setup(stage)
        augmentation = getattr(self.trainer.datamodule, "augmentation", None)
        if stage == "fit" and augmentation is not None and augmentation.background == "white":
            raise InputError("InstantBooth sees objects on black (Eq. 1): set data.augmentation.background to black")

    def pipeline(self) -> InstantBoothPipeline:
        return self.pipeline_of(
            InstantBoothPipeline,
            unet=self.net.unet,
            image_encoder=self.net.vision,
            concept=self.net.concept,
            vision=self.image_encoder,
            vision_digest=self.vision_digest,
            before_text=self.before_text,
            tuned_vision_layers=self.net.tuned_vision_layers,
            tuned_unet=self.net.tuned_unet,
        )
