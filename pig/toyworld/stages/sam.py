"""The segmenter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from tqdm import tqdm

from pig.models.segmenters import SamSize, build_sam, encode, masks_for, save_sam
from pig.toyworld import scene
from pig.toyworld.captions import SIZE, any_scene, pictures_of
from pig.toyworld.stages.base import Stage, autocast


class SAMStage(Stage):
    """Segment Anything at 64 px: from points and boxes to the object's mask, or what lies behind it.

    Its paper's loss (arXiv 2304.02643, appendix A): focal + dice, of the three masks of a point only the best one, and
    the squared error of the predicted IoU. Half of the pictures went through the VAE, as those of the UNet will have.
    """

    steps, batch_size, lr = 8000, 16, 1e-3
    size = SamSize(image=SIZE, patch=4, width=96, depth=4, heads=4, prompt_width=64)
    drawn = 24_000
    points = 3  # prompts of one point a picture; the last lies on the background

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.sam: Sam = build_sam(self.size)
        self.frozen = {"vae": AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32)}

    @staticmethod
    def scenes(count: int, first_seed: int) -> tuple[Tensor, Tensor]:
        """Pictures (N, 3, SIZE, SIZE) and masks (N, SIZE, SIZE), uint8: the visible part, without what is worn."""
        seeds = tqdm(range(first_seed, first_seed + count), desc="drawing", mininterval=5)
        drawings = [any_scene(seed, accessories=0.3, partial=0.3).draw() for seed in seeds]
        return pictures_of(drawings), torch.stack([torch.tensor(one.mask) for one in drawings])

    @torch.no_grad()
    def dataset(self) -> Dataset[Any]:
        images, masks = self.scenes(self.drawn, first_seed=0)
        vae = self.frozen["vae"].to(self.device)
        for start in tqdm(range(0, len(images), 128), desc="VAE", mininterval=5):
            chunk = images[start : start + 64].to(self.device).float() / 127.5 - 1
            with autocast(self.device):
                latents = vae.encode(chunk).latent_dist.mean
                decoded = vae.decode(latents + 0.05 * torch.randn_like(latents)).sample.float()
            images[start : start + 64] = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
        return TensorDataset(images, masks)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, masks = batch
        if torch.rand(()) < 0.5:
            images, masks = images.flip(3), masks.flip(2)
        inside = masks > 127  # (B, H, W)
        points, boxes = zip(*(self.prompts(mask) for mask in inside), strict=True)
        logits, quality = self.predict(images, torch.stack(points), torch.stack(boxes))  # (B, P + 1, 4, H, W)

        target = inside[:, None].repeat(1, self.points + 1, 1, 1)
        target[:, self.points - 1] = ~inside
        loss_of_mask = mask_loss(logits, target[:, :, None].expand_as(logits))  # (B, P + 1, 4)
        # Mask 0 answers prompts that leave no doubt, the others share the doubtful ones.
        mask = loss_of_mask[..., 0] + loss_of_mask[..., 1:].amin(-1)
        with torch.no_grad():
            iou = overlap(logits > 0, target[:, :, None])
        self.log("iou", iou[:, :-1, 1:].amax(-1).mean(), prog_bar=True)
        return mask.mean() + F.mse_loss(quality, iou)

    def prompts(self, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Points (P, 2) as x, y and a box (4,) for a mask (H, W): jittered by a tenth, or now and then all."""
        on, off = inside.nonzero(), (~inside).nonzero()
        rows = [on[torch.randint(len(on), (self.points - 1,))], off[torch.randint(len(off), (1,))]]
        points = torch.cat(rows).flip(1).float()
        if torch.rand(()) < 0.2:
            return points, torch.tensor([0.0, 0.0, SIZE, SIZE], device=inside.device)
        corners = torch.cat([on.amin(0).flip(0), on.amax(0).flip(0) + 1]).float()
        reach = (corners[2:] - corners[:2]).repeat(2)
        jitter = (torch.rand(4, device=inside.device) - 0.5) * 0.2 * reach
        return points, (corners + jitter).clamp(0, SIZE)

    def predict(self, images: Tensor, points: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, P + 1, 4, H, W) and predicted IoU (B, P + 1, 4) of P points and one box for each picture."""
        sam, b, p = self.sam, len(images), self.points
        features = sam.image_encoder(sam.preprocess(images.float()))
        ones = torch.ones(b * p, 1, dtype=torch.int, device=images.device)
        of_points, nothing = sam.prompt_encoder(points=(points.view(b * p, 1, 2), ones), boxes=None, masks=None)
        of_boxes, _ = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
        sparse = torch.cat([of_points.view(b, p, *of_points.shape[1:]), of_boxes[:, None]], dim=1).flatten(0, 1)
        # The decoder takes one picture and many prompts. It adds the dense prompt to the picture's features: given
        # there, each prompt brings the features of its own picture.
        dense = features.repeat_interleave(p + 1, 0) + nothing[:1]
        masks, quality = sam.mask_decoder.predict_masks(
            image_embeddings=torch.zeros_like(features[:1]),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        return masks.float().view(b, p + 1, *masks.shape[1:]), quality.float().view(b, p + 1, -1)

    def save(self, out: Path) -> None:
        images, masks = self.scenes(300, scene.HELD_OUT_SEED)
        inside, found = masks > 127, []
        for image, mask in zip(images.permute(0, 2, 3, 1).numpy(), inside, strict=True):
            _, box = self.prompts(mask)
            best = masks_for(self.sam, encode(self.sam, [image]), (SIZE, SIZE), box=box.tolist())[0]
            found.append(best.mask)
        iou = overlap(torch.from_numpy(np.stack(found)), inside)
        print(f"sam: held-out scenes by a jittered box, mean IoU {iou.mean():.3f}, worst {iou.min():.3f}")
        save_sam(self.sam, self.size, out / "sam")


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """20 focal + dice, over the last two axes."""
    target = target.float()
    right = torch.sigmoid(torch.where(target > 0.5, logits, -logits))
    focal = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * (1 - right) ** 2).mean((-2, -1))
    found = logits.sigmoid()
    dice = 1 - (2 * (found * target).sum((-2, -1)) + 1) / (found.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return 20 * focal + dice


def overlap(found: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of boolean masks, over the last two axes."""
    both = (found & target).sum((-2, -1)).float()
    return both / (found | target).sum((-2, -1)).clamp(min=1)
