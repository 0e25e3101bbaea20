"""How each of the toy world's small models is trained: one LightningModule, its settings at the top of the class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from pig import diffusion
from pig.toyworld import scene
from pig.toyworld.captions import (
    CATEGORIES,
    COLOURS,
    PLACES,
    SIZE,
    TOKENS,
    caption_of,
    classify,
    facts_of,
    make_tokenizer,
    random_scenes,
    render,
    report_clip,
    standardised,
    tokens,
)


class Stage(LightningModule):
    """Shared by all stages: AdamW with warm-up, cosine decay to zero in `cycles` equal parts, and the data loader."""

    steps: ClassVar[int]
    cycles: ClassVar[int] = 1
    batch_size: ClassVar[int]
    lr: ClassVar[float]
    ema: ClassVar[float] = 0.998

    def dataset(self) -> Dataset[Any]:
        raise NotImplementedError

    def save(self, out: Path) -> None:
        """Write what was learnt in its public format below `out`."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), self.batch_size, shuffle=True, drop_last=True)

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)

        def factor(step: int) -> float:
            length = self.steps // self.cycles
            since = step % length if step < self.steps else length
            return min(1.0, (since + 1) / 200) * 0.5 * (1 + math.cos(math.pi * since / length))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class VAEStage(Stage):
    """AutoencoderKL, 64 px -> 4 x 16 x 16.

    Reconstruction (L1 + 4 MSE) and two additions that small autoencoders need: an anchor that pulls the first three
    channels of the latents to the shrunken image, which settles the hues early, and a little noise on the latents,
    which makes the decoder forgive the UNet's small errors.
    """

    steps, batch_size, lr = 3200, 16, 2e-3
    anchor, noise = 0.2, 0.05

    def __init__(self) -> None:
        super().__init__()
        self.vae = AutoencoderKL(
            block_out_channels=(32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=SIZE,
            mid_block_add_attention=False,
        )

    def dataset(self) -> Dataset[Any]:
        return TensorDataset(random_scenes(16_000, first_seed=0)[0])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images = batch[0].float() / 127.5 - 1
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mean
        decoded = self.vae.decode(z + self.noise * torch.randn_like(z)).sample.float()
        error = decoded - images
        small = F.avg_pool2d(images, SIZE // z.shape[-1])
        loss = (
            error.abs().mean()
            + 4 * error.square().mean()
            + self.anchor * (z[:, :3].float() - 2 * small).abs().mean()
            + 1e-5 * posterior.kl().mean() / z[0].numel()
        )
        self.log("psnr", 10 * torch.log10(4 / error.detach().square().mean()), prog_bar=True)
        return loss

    @torch.no_grad()
    def save(self, out: Path) -> None:
        images = random_scenes(256, first_seed=scene.HELD_OUT_SEED)[0].float() / 127.5 - 1
        latents = self.vae.encode(images).latent_dist.mean
        self.vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
        decoded = self.vae.decode(latents).sample.clamp(-1, 1)
        psnr = 10 * torch.log10(4 / (decoded - images).square().flatten(1).mean(1))
        print(f"vae: held-out PSNR {psnr.mean():.2f} dB, latent std {latents.std():.3f}")
        self.vae.half().save_pretrained(out / "base/vae")


class CLIPStage(Stage):
    """CLIP (both towers) and its tokenizer.

    The contrastive loss of CLIP with one change: many pictures of a batch fit the same caption, so each caption's
    target is spread over all pictures that it is true of.
    """

    steps, batch_size, lr = 2000, 128, 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        special = {
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        tower = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 384, "projection_dim": 64}
        text = {**tower, **special, "num_hidden_layers": 2, "vocab_size": len(self.tokenizer)}
        vision = {**tower, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8}
        self.clip = CLIPModel(
            CLIPConfig(text_config={**text, "max_position_embeddings": TOKENS}, vision_config=vision, projection_dim=64)
        )
        self.clip.set_attn_implementation("eager")  # see UNetStage

    def dataset(self) -> Dataset[Any]:
        images, subjects, background = random_scenes(24_000, first_seed=0)
        facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
        return TensorDataset(images, facts)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, facts = batch
        texts, claims = zip(*(caption_of(row) for row in facts.tolist()), strict=True)
        claim = torch.tensor(claims, device=self.device)  # (B, 3), -1 where the caption says nothing
        true = ((claim == facts[:, None]) | (claim < 0)).all(-1).float()  # [image, text]
        shift = torch.randint(-4, 5, (2,)).tolist()
        pixels = standardised(images.roll(shift, (2, 3)), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        out = self.clip(input_ids=tokens(self.tokenizer, texts).to(self.device), pixel_values=pixels)
        logits = out.logits_per_image.float()
        self.log("right", true.gather(1, logits.argmax(1, keepdim=True)).mean(), prog_bar=True)
        return (
            F.cross_entropy(logits, true / true.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, (true / true.sum(0)).T)
        ) / 2

    @torch.no_grad()
    def save(self, out: Path) -> None:
        report_clip(self.clip, self.tokenizer)
        self.clip.half().save_pretrained(out / "clip")
        processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        CLIPProcessor(processor, self.tokenizer).save_pretrained(out / "clip")
        text = CLIPTextModel.from_pretrained(out / "clip", dtype=torch.float16)
        text.save_pretrained(out / "base/text_encoder")
        self.tokenizer.save_pretrained(out / "base/tokenizer")


class VisionStage(Stage):
    """Bring CLIP's image tower, the slower learner, up to its text tower, which stays as `clip` left it.

    Every picture is held against all captions of its kind: 120 of category and background, 144 of colour and
    category (LiT, arXiv 2111.07991, with the whole vocabulary in place of the batch).
    """

    steps, batch_size, lr = 7000, 128, 1e-3

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.weights = weights
        self.tokenizer = CLIPTokenizer.from_pretrained(weights)
        self.clip = CLIPModel.from_pretrained(weights, dtype=torch.float32, attn_implementation="eager")
        self.clip.text_model.requires_grad_(False)
        self.clip.text_projection.requires_grad_(False)
        places = [scene.caption(category, place) for category in CATEGORIES for place in PLACES]
        colours = [f"a photo of a {colour} {category}" for category in CATEGORIES for colour in COLOURS]
        with torch.no_grad():
            embeds = self.clip.get_text_features(input_ids=tokens(self.tokenizer, places + colours)).pooler_output
        self.register_buffer("captions", F.normalize(embeds, dim=-1), persistent=False)
        self.places = len(places)

    def dataset(self) -> Dataset[Any]:
        images, subjects, background = random_scenes(48_000, first_seed=0)
        return TensorDataset(images, torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)]))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, facts = batch
        shift = torch.randint(-5, 6, (2,)).tolist()
        pixels = standardised(images.roll(shift, (2, 3)), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(3)
        embeds = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)
        logits = self.clip.logit_scale.exp() * embeds @ self.captions.T
        category, place, colour = facts.unbind(1)
        place_logits, colour_logits = logits[:, : self.places], logits[:, self.places :]
        right = place_logits.argmax(1) // len(PLACES) == category
        self.log("category", right.float().mean(), prog_bar=True)
        return F.cross_entropy(place_logits, category * len(PLACES) + place) + F.cross_entropy(
            colour_logits, category * len(COLOURS) + colour
        )

    def save(self, out: Path) -> None:
        report_clip(self.clip, self.tokenizer)
        self.clip.half().save_pretrained(out / "clip")


class DINOStage(Stage):
    """A ViT whose [CLS] token says which individual is seen: the score network for subject fidelity.

    Two scenes of one subject (other place, other pose) attract, all other pictures repel (InfoNCE on the normalised
    [CLS] token itself, tau = 0.1). No colour jitter: colour is identity here. Blur, noise and crops, so that
    pictures that went through a VAE are judged by what they show.
    """

    steps, batch_size, lr = 2000, 96, 1e-3
    views, temperature = 4, 0.1

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=SIZE,
            patch_size=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.vit.set_attn_implementation("eager")  # see UNetStage

    @staticmethod
    def scenes(count: int, first_seed: int, views: int) -> Tensor:
        """(count, views, 3, SIZE, SIZE): `views` scenes of each of `count` subjects."""
        subjects = [scene.make_subject(first_seed + i) for i in range(count) for _ in range(views)]
        background = [PLACES[(3 * i + i // len(PLACES)) % len(PLACES)] for i in range(len(subjects))]
        images = render(range(first_seed, first_seed + len(subjects)), background, subjects)
        return images.view(count, views, *images.shape[1:])

    def dataset(self) -> Dataset[Any]:
        return TensorDataset(self.scenes(6000, 0, self.views))

    @staticmethod
    def pixels(images: Tensor) -> Tensor:
        return standardised(images, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def augment(self, images: Tensor) -> Tensor:
        x = self.pixels(images)
        if torch.rand(()) < 0.5:
            small = int(torch.randint(24, 49, ()))
            x = F.interpolate(F.interpolate(x, small, mode="area"), SIZE, mode="bicubic")
        if torch.rand(()) < 0.8:
            margin = int(torch.randint(0, 6, ()))
            x = F.interpolate(x[..., margin : SIZE - margin, margin : SIZE - margin], SIZE, mode="bicubic")
        return x + 0.1 * torch.rand(()) * torch.randn_like(x)

    def embed(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.vit(pixels).last_hidden_state[:, 0].float(), dim=-1)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images = batch[0]
        first, second = torch.randperm(self.views)[:2].tolist()
        a, b = self.embed(self.augment(images[:, first])), self.embed(self.augment(images[:, second]))
        logits = a @ b.T / self.temperature
        target = torch.arange(len(a), device=a.device)
        self.log("top1", (logits.argmax(1) == target).float().mean(), prog_bar=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    @torch.no_grad()
    def save(self, out: Path) -> None:
        images = self.scenes(200, scene.HELD_OUT_SEED, 2)
        a, b = (self.embed(self.pixels(images[:, i])) for i in (0, 1))
        top1 = ((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean().item()
        print(f"dino: same subject among 200, top-1 {top1:.1%}, mean cosine {(a * b).sum(1).mean():.3f}")
        self.vit.half().save_pretrained(out / "dino")
        size = {"height": SIZE, "width": SIZE}
        ViTImageProcessor(size=size, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD).save_pretrained(
            out / "dino"
        )


class UNetStage(Stage):
    """The base model: a UNet2DConditionModel on the VAE's latents, conditioned by CLIP's text tower.

    v-prediction: at this size it gives clean pictures long before epsilon-prediction does.
    """

    steps, cycles, batch_size, lr = 15_000, 2, 32, 1e-3
    ema = 0.999
    caption_dropout = 0.1  # trains the empty prompt, for classifier-free guidance

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128, 160),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=128,
            attention_head_dim=4,  # diffusers' name for the number of heads
        )
        # Twice as fast as scaled_dot_product_attention in bf16 training on CPUs.
        self.unet.set_attn_processor(AttnProcessor())
        self.unet.compile()  # a fifth faster on CPUs, for two minutes at the start
        self.scheduler = UniPCMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32)
        self.frozen = {"text_encoder": text_encoder, "vae": vae}  # a dict: not part of the module

    @torch.no_grad()
    def dataset(self) -> Dataset[Any]:
        subjects = [scene.make_subject(seed) for seed in range(24_000)]
        background = [scene.training_background(s.category, seed) for seed, s in enumerate(subjects)]
        images = render(range(24_000), background, subjects)
        facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
        vae = self.frozen["vae"].to(self.device)
        latents = []
        for chunk in tqdm(images.split(64), desc="encoding", mininterval=5):
            with torch.autocast(self.device.type, torch.bfloat16):
                mean = vae.encode(chunk.to(self.device).float() / 127.5 - 1).latent_dist.mean
            latents.append(mean.float().cpu() * vae.config.scaling_factor)
        return TensorDataset(torch.cat(latents), facts)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        text_encoder = self.frozen["text_encoder"].to(self.device)
        return text_encoder(tokens(self.tokenizer, texts).to(self.device))[0]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        z_0, facts = batch
        texts = ["" if torch.rand(()) < self.caption_dropout else caption_of(row)[0] for row in facts.tolist()]
        t = torch.randint(0, 1000, (len(z_0),), device=self.device)
        noise = torch.randn_like(z_0)
        alpha, sigma = diffusion.alpha_sigma(self.scheduler.alphas_cumprod, t)
        z_t = diffusion.add_noise(z_0, noise, alpha, sigma)
        predicted = self.unet(z_t, t, self.encode(texts)).sample
        loss = diffusion.loss_per_sample(predicted, diffusion.target(z_0, noise, alpha, sigma, "v_prediction")).mean()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other shapes than in training: compiling again would not pay
    def save(self, out: Path) -> None:
        self.unet.set_default_attn_processor()
        base = StableDiffusionPipeline(
            vae=self.frozen["vae"].cpu(),
            text_encoder=self.frozen["text_encoder"].cpu(),
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        clip = CLIPModel.from_pretrained(out / "clip", dtype=torch.float32)
        subjects = [scene.make_subject(scene.HELD_OUT_SEED + i) for i in range(500)]
        background = [scene.held_out_background(subject.category) for subject in subjects]
        facts = torch.tensor([facts_of(s, b) for s, b in zip(subjects, background, strict=True)])
        prompts = [
            scene.caption(scene.object_phrase(s, with_colour=i % 5 == 0), b)
            for i, (s, b) in enumerate(zip(subjects, background, strict=True))
        ]
        base.set_progress_bar_config(disable=True)
        images = []
        for start in tqdm(range(0, len(prompts), 20), desc="sampling", mininterval=5):
            drawn = base(
                prompts[start : start + 20],
                num_inference_steps=20,
                guidance_scale=3.0,
                generator=[torch.Generator().manual_seed(start + i) for i in range(20)],
                output_type="np",
            ).images
            images.append(torch.from_numpy(drawn * 255).round().byte().permute(0, 3, 1, 2))
        found = classify(clip, self.tokenizer, torch.cat(images))
        category, place = (found == facts[:, :2]).float().mean(0).tolist()
        print(f"unet: 500 held-out captions, CLIP finds the category in {category:.1%}, background in {place:.1%}")
        base.vae.register_to_config(_name_or_path="")  # else the path of this machine
        base.to(dtype=torch.float16).save_pretrained(out / "base")
