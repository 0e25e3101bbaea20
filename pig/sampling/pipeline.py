"""The base class of all methods' pipelines: prompts and references in, pictures out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Generator, Tensor, nn

from pig.data.subjects import Segment
from pig.data.transforms import to_images
from pig.errors import InputError, check_named, check_ranges
from pig.models.backbone import Backbone, align, check_size, decode_latents, make_scheduler, vae_scale
from pig.sampling.call import Call, Drawn
from pig.sampling.encoding import EncodingPipeline
from pig.sampling.guidance import combine, weights_at
from pig.sampling.inpainting import KnownRegion
from pig.sampling.loop import OnStep, denoise
from pig.sampling.references import Picture, ReferenceCache, cut_outs_of
from pig.sampling.settings import SamplingSettings, signed

log = logging.getLogger(__name__)

OutputType = Literal["pil", "pt", "np", "latent"]
StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class SubjectPipeline(EncodingPipeline):
    """Base of the methods' pipelines.

    A method registers its parts and its own defaults in `__init__` (`register`), makes itself from a base model
    (`from_backbone`), and says how to read what a call is given (`condition`) and what its network predicts
    (`branches`). Everything else (prompts, sizes, references, guidance, inpainting, the loop, callbacks, output) stands
    here.
    """

    without_references: ClassVar[Mapping[str, Any] | None] = None  # settings that promise the base model, bit for bit
    Settings: ClassVar[type[SamplingSettings]] = SamplingSettings
    reads_references: ClassVar[bool] = True
    has_loops: ClassVar[bool] = False  # whether it draws a picture again and again

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__call__ = signed(SubjectPipeline.__call__, cls.Settings)  # type: ignore[method-assign]

    # -- what a method defines ----------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(cls, backbone: Backbone, *, base: str, settings: Mapping[str, Any], **options: Any) -> Self:
        """The method on a base model, untrained.

        Args:
            base: the base model's name, as `load_backbone` takes it.
            settings: what the model's defaults are, where they differ from the class's.
            options: of the method's networks; those that `model_options` gives.
        """
        raise NotImplementedError

    @classmethod
    def further_models(cls, base: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Hub ids of the models that drawing loads besides the model's own parts."""
        return ()

    @classmethod
    def check_prompt(cls, prompt: str, noun: str, settings: Any) -> None:
        """Refuse a prompt that the method cannot draw for this class noun; `generate` asks before anything long."""

    def text_of(self, prompt: str, noun: str, settings: Any) -> str:
        """The prompt as the text encoder sees it. noun: the class noun; "" where it is not known."""
        return prompt

    def condition(self, call: Call, settings: Any) -> Any:
        """What the steps need of prompts and references, read once per call."""
        raise NotImplementedError

    def branches(
        self, latents: Tensor, t: Tensor, step: int, names: Sequence[str], condition: Any, settings: Any
    ) -> Tensor:
        """The predictions of one step, (len(names) B, 4, h, w): those of the first branch, then of the next, ...

        Args:
            latents: (B, 4, h, w), as the scheduler scales them for a network.
            names: of the branches: `uncond` (no references, no text), `im` (references), `text_im` (both).
        """
        raise NotImplementedError

    def weights(self, step: int, condition: Any, settings: Any) -> Mapping[str, float]:
        """Of the branches in a step, within the guidance interval."""
        return condition.weights

    def predict(self, latents: Tensor, t: Tensor, step: int, condition: Any, settings: Any) -> Tensor:
        """The guided prediction (B, 4, h, w) of one step."""
        weights = weights_at(self.weights(step, condition, settings), step, condition.steps, settings)
        predicted = self.branches(latents, t, step, list(weights), condition, settings)
        return combine(dict(zip(weights, predicted.chunk(len(weights)), strict=True)), weights, settings)

    def draw(self, noise: Tensor, call: Call, condition: Any, settings: Any) -> Tensor:
        """Latents (B, 4, h, w) of the pictures from standard normal noise; by default one run of the loop."""
        return self.denoise(noise * call.scheduler.init_noise_sigma, call, condition, settings)

    def denoise(self, latents: Tensor, call: Call, condition: Any, settings: Any, *, first: int = 0) -> Tensor:
        """One run of the loop from step `first` on, with a scheduler of its own (some remember their last run), the
        call's callback and a progress bar. A method may run it as often as it likes.

        latents: (B, 4, h, w), at the noise level of that step.
        """
        scheduler = copy.deepcopy(call.scheduler)
        timesteps = scheduler.timesteps[first:]
        if first and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)

        def predict(latents: Tensor, t: Tensor, step: int) -> Tensor:
            return self.predict(latents, t, first + step, condition, settings)

        with self.progress_bar(total=len(timesteps)) as bar:

            def on_step(step: int, t: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
                bar.update()
                return call.on_step(step, t, latents)

            return denoise(
                predict,
                latents,
                scheduler,
                timesteps,
                generator=call.generator,
                known=call.known,
                on_step=on_step,
            )

    @property
    def tuned_parts(self) -> tuple[SubjectPipeline, ...]:
        """Those whose weights a subject's own take the place of."""
        return (self,)

    def steps_of(self, settings: Any, *, edits: bool = False) -> int:
        """How many steps of the loop a picture takes, at most. edits: drawn into a picture that is given."""
        return settings.num_inference_steps

    # -- shared -------------------------------------------------------------------------------------------------------

    def register(self, *, base: str | None, settings: Mapping[str, Any] | None, parts: Mapping[str, Any]) -> None:
        """Note the parts, where they come from, and the model's own defaults (checked)."""
        for part in parts.values():
            if isinstance(part, nn.Module):
                align(part)
        self.register_modules(**parts)
        self.register_to_config(base=base, settings=dict(settings or {}))
        self.Settings.given(self.config.settings, {})
        self.reference_cache: ReferenceCache | None = None

    def settings(self, **named: Any) -> Any:
        """The settings of a call that names these: the rest as the model has it.

        Raises:
            InputError: an unknown control, or a value it does not take.
        """
        return self.Settings.given(self.config.settings, named)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        *,
        class_noun: str | Sequence[str] = "",
        segment: Segment | None = None,
        image: Image.Image | None = None,
        mask_image: Image.Image | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        keep_loops: bool = False,
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> Any:
        """Draw `num_images_per_prompt` pictures for each prompt.

        Args:
            prompt: one or several.
            references: pictures of the subject, the same for all prompts; or a list of such lists, one for each
                prompt, all of one length. A picture is a file, PIL, or, within a list, a pair of PIL and its mask
                (`[(picture, mask)]`; a tuple in the place of a list is a list). The object is found by the
                picture's own alpha, else by its mask (of a file, by `NAME.mask.png`), else by `segment`; without any
                of them the whole picture is taken.
            class_noun: what the references show; or one for each prompt.
            segment: see `pig.models.foreground.make_segmenter`.
            image, mask_image: inpainting: draw only where the mask is white; see `KnownRegion`.
            height, width: in pixels; by default what the base model was trained at, or the size of `image`.
            generator: one for all pictures, or a list with one for each picture, prompt by prompt.
            latents: (N, 4, height / 8, width / 8), standard normal noise to start from, in place of the generator's.
            output_type: `pil`; `pt`: (N, 3, H, W) in [0, 1]; `np`: (N, H, W, 3) in [0, 1]; `latent`: (N, 4, h, w),
                scaled.
            keep_loops: of a method that draws in loops: return `loops` beside `images`: of each picture the first
                version and that of every loop, the last one being the picture itself.
            callback_on_step_end: as in diffusers: called with this pipeline, step, t and `{"latents": ...}`, whose
                latents it may replace. A method that draws in loops counts the steps of each loop from 0.
                Setting `pipeline._interrupt = True` ends the drawing as it stands.
            settings: the method's controls; see its `Settings`.

        Raises:
            InputError: no references, an unknown control, a setting out of its range, a size the model cannot do, or
                more references than memory allows.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images_per_prompt < 1 or not prompts:
            raise InputError("give at least one prompt and one image per prompt")
        check_named("output_type", output_type, ("pil", "pt", "np", "latent"))
        if keep_loops and not self.has_loops:
            raise InputError(f"keep_loops: {self.method} draws without loops")
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise InputError("callback_on_step_end_tensor_inputs: a step has `latents` and nothing else")
        chosen = self.settings(**settings)
        scheduler = self.scheduler_of(chosen)
        if (image is None) != (mask_image is None):
            raise InputError("inpainting needs both the picture (image) and its mask (mask_image)")
        native = self.native_size
        own = (native, native) if image is None else (image.height, image.width)
        height, width = (own[0] if height is None else height, own[1] if width is None else width)
        check_size(self.vae, width, height)
        if image is not None and image.size != (width, height):
            raise InputError(f"inpainting keeps the picture's size {image.size}; leave height and width away")
        cutouts = cut_outs_of(prompts, references, segment) if self.reads_references else [[] for _ in prompts]
        for cut in filter(None, map(self.cut_off, dict.fromkeys(prompts))):
            log.warning("the prompt is too long, its end is not read: %r%s", cut[:80], " ..." if cut[80:] else "")

        count, factor = len(prompts) * num_images_per_prompt, vae_scale(self.vae)
        shape = (count, self._unet.config.in_channels, height // factor, width // factor)
        if latents is not None and tuple(latents.shape) != shape:
            raise InputError(f"latents must be {shape} for these pictures, got {tuple(latents.shape)}")
        if isinstance(generator, list) and len(generator) != count:
            raise InputError(f"{len(generator)} generators for {count} pictures: give one for each, or one for all")
        noise = latents
        if noise is None:
            noise = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self._unet.dtype)
        noise = noise.to(self._execution_device, self._unet.dtype)
        known = None if image is None or mask_image is None else KnownRegion(self.vae, image, mask_image, noise)
        nouns = [class_noun] * len(prompts) if isinstance(class_noun, str) else list(class_noun)
        if len(nouns) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(nouns)} class nouns")
        loops: list[list[Any]] = [[] for _ in range(count)]

        def on_loop(pictures: Sequence[int], latents: Tensor) -> None:
            if keep_loops:
                for one, version in zip(pictures, latents.split(1), strict=True):
                    loops[one].append(self._output(version, known, output_type)[0])

        call = Call(
            prompts=prompts,
            references=cutouts,
            class_nouns=nouns,
            images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            scheduler=scheduler,
            generator=generator,
            on_step=self._step_handler(callback_on_step_end),
            on_loop=on_loop,
            known=known,
        )
        self._interrupt = False
        drawn = self.draw(noise, call, self.condition(call, chosen), chosen)
        found = Drawn(self._output(drawn, known, output_type), loops if keep_loops else None)
        self.maybe_free_model_hooks()
        return found if return_dict else found.to_tuple()

    def scheduler_of(self, settings: SamplingSettings) -> SchedulerMixin:
        """The scheduler of a call with these settings, its timesteps set."""
        scheduler = self.scheduler
        if settings.scheduler is not None:
            scheduler = make_scheduler(settings.scheduler, scheduler.config)
        steps = settings.num_inference_steps
        check_ranges(num_inference_steps=(steps, 1, scheduler.config.num_train_timesteps))
        scheduler.set_timesteps(steps, device=self._execution_device)
        if int(scheduler.timesteps.max()) >= scheduler.config.num_train_timesteps:
            raise InputError(f"num_inference_steps={steps} are too many for this sampler's spacing: give fewer")
        return scheduler

    def _step_handler(self, callback: StepCallback | None) -> OnStep:
        def on_step(step: int, t: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
            if callback is not None:
                latents = (callback(self, step, t, {"latents": latents}) or {}).get("latents", latents)
            return latents, not self._interrupt

        return on_step

    def _output(self, latents: Tensor, known: KnownRegion | None, output_type: OutputType) -> Any:
        if not latents.isfinite().all():
            raise InputError(
                "the model has drawn numbers that are not finite (NaN): its weights are damaged, or too large for half "
                "precision (try float32)"
            )
        if output_type == "latent":
            return latents
        images = torch.cat([decode_latents(self.vae, one) for one in latents.split(1)])  # one at a time: memory
        if known is not None:
            images = known.paste(images)
        if output_type == "pil":
            return to_images(images)
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).float().cpu().numpy()
