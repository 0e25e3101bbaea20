"""What a training sample costs: Algorithm 1 written plainly with diffusers, and ours: `make bench-training`.

    python -m benchmarks.training [--batch 8] [--steps 5] [--out runs/bench/training.json]

The toy model, float32, encoders online in both; FLOPs by torch's counter, the machine's peak by a large product. The
plain way encodes the caption once for each UNet, runs the Reference UNet to its end, gives samples whose references
are dropped a Base pass of their own, and reads the loss at every step.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DDPMScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.sampling import flops_of, machine
from data_gen.toyworld import draw_triplets
from pig.data.modules import TripletDataModule
from pig.data.schema import Batch
from pig.diffusion import draw
from pig.methods.bootpig import BootPIG
from pig.models.backbone import load_backbone, tokenize
from pig.models.two_unet import TwoUNet

WAYS = ("naive", "ours")
RATES = {"reference_unet": 5e-4, "rsa": 5e-4}  # of configs/bootpig/toyworld.yaml
console = Console(soft_wrap=True)


class Naive(nn.Module):
    """Algorithm 1 (BootPIG, arXiv 2401.13974) with diffusers' own UNets and scheduler, by hooks."""

    def __init__(self, base: str) -> None:
        super().__init__()
        parts = load_backbone(base)
        self.vae, self.text_encoder, self.tokenizer = parts.vae, parts.text_encoder, parts.tokenizer
        self.scheduler = DDPMScheduler.from_config(parts.scheduler.config)
        self.base_unet, self.reference_unet = parts.unet.train(), copy.deepcopy(parts.unet).train()
        # What is trained is the same as ours; its names are those of a TwoUNet.
        names = TwoUNet(copy.deepcopy(parts.unet), copy.deepcopy(parts.unet)).trainable_parameters()
        self.requires_grad_(False)
        own = dict(self.named_parameters())
        self.groups = {group: {name: own[name] for name in of} for group, of in names.items()}
        for parameters in self.groups.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self.features: dict[str, Tensor] | None = None
        self.collected: dict[str, Tensor] = {}
        for name, layer in self.reference_unet.named_modules():
            if name.endswith("attn1"):
                layer.register_forward_pre_hook(lambda _, args, name=name: self.collected.update({name: args[0]}))
        for name, layer in self.base_unet.named_modules():
            if name.endswith("attn1"):
                layer.register_forward_hook(self._rsa(name))

    def _rsa(self, name: str) -> Callable[..., Tensor | None]:
        """Eq. 2: keys and values of the image's and the reference's features together."""

        def hook(attn: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self.features is None:
                return None
            f, both = args[0], torch.cat([args[0], self.features[name]], 1)
            q, k, v = (
                x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for x in (attn.to_q(f), attn.to_k(both), attn.to_v(both))
            )
            return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        return hook

    @torch.no_grad()
    def _text(self, captions: list[str]) -> Tensor:
        return self.text_encoder(tokenize(self.tokenizer, captions))[0]

    @torch.no_grad()
    def _latents(self, pictures: Tensor) -> Tensor:
        return self.vae.encode(pictures).latent_dist.mode() * self.vae.config.scaling_factor

    def loss(self, batch: Batch, reference_dropout: float, caption_dropout: float) -> Tensor:
        """The mean over the batch, one reference each."""
        z, z_ref = self._latents(batch.target), self._latents(batch.reference[:, 0])
        noise, noise_ref, u = draw(batch.seeds, z.shape, z_ref[:, None].shape)
        t = (u[:, 0] * self.scheduler.config.num_train_timesteps).long()
        self.collected.clear()
        self.features = None
        self.reference_unet(self.scheduler.add_noise(z_ref, noise_ref[:, 0], t), t, self._text(batch.captions))
        captions = ["" if one < caption_dropout else text for one, text in zip(u[:, 2], batch.captions, strict=True)]
        text, z_t = self._text(captions), self.scheduler.add_noise(z, noise, t)
        dropped, predicted = u[:, 1] < reference_dropout, torch.zeros_like(z)
        if dropped.any():
            self.features = None
            predicted[dropped] = self.base_unet(z_t[dropped], t[dropped], text[dropped]).sample
        if not dropped.all():
            self.features = {name: f[~dropped] for name, f in self.collected.items()}
            predicted[~dropped] = self.base_unet(z_t[~dropped], t[~dropped], text[~dropped]).sample
        if self.scheduler.config.prediction_type == "v_prediction":
            return F.mse_loss(predicted, self.scheduler.get_velocity(z, noise, t))
        return F.mse_loss(predicted, noise)

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": list(of.values()), "lr": RATES[g]} for g, of in self.groups.items()])

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, dropout: float = 0.15) -> float:
        optimizer.zero_grad()
        loss = self.loss(batch, dropout, dropout)
        loss.backward()
        nn.utils.clip_grad_norm_([p for of in self.groups.values() for p in of.values()], 1.0)
        optimizer.step()
        return loss.item()


class Ours:
    """`BootPIG` as Lightning drives it, without Lightning: one step of its loss, its optimizer and clipping."""

    def __init__(self, base: str) -> None:
        self.module = BootPIG(base, lr_reference=RATES["reference_unet"], lr_rsa=RATES["rsa"])

    def optimizer(self) -> torch.optim.Optimizer:
        return self.module.configure_optimizers()

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, dropout: float = 0.15) -> Tensor:
        optimizer.zero_grad()
        loss = self.module.loss(batch, dropout, dropout)[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.module.trainable().values()), 1.0)
        optimizer.step()
        return loss.detach()


def measure(way: str, batches: list[Batch]) -> dict[str, Any]:
    """Median seconds of a step after one that warms up, FLOPs of one, and what the process took at most."""
    trained: Naive | Ours = Naive("toyworld") if way == "naive" else Ours("toyworld")
    optimizer, size, seconds = trained.optimizer(), len(batches[0].seeds), []
    flops = flops_of(lambda: trained.step(optimizer, batches[0]))
    for batch in batches:
        began = time.perf_counter()
        trained.step(optimizer, batch)
        seconds.append(time.perf_counter() - began)
    found = {"way": way, "batch": size, "samples_per_second": size / median(seconds)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "flops_per_sample": flops / size, "peak_memory_bytes": peak}


def in_own_process(way: str, batches: list[Batch]) -> dict[str, Any]:
    """So that one way's memory is not the other's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (way, batches))


def measured_peak(size: int = 2048, times: int = 4) -> float:
    """FLOP/s of a large float32 product on this machine."""
    a = torch.randn(size, size)
    a @ a
    began = time.perf_counter()
    for _ in range(times):
        a @ a
    return 2 * size**3 * times / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/training.json"))
    chosen = parser.parse_args()
    shards = chosen.out.parent / "triplets"
    draw_triplets(shards, chosen.batch * chosen.steps, 64)
    data = TripletDataModule(str(shards), batch_size=chosen.batch, resolution=64, num_workers=0)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(chosen.steps), strict=False)]
    peak = measured_peak()
    rows = [in_own_process(way, batches) for way in WAYS]
    for row in rows:
        row["share_of_peak"] = row["flops_per_sample"] * row["samples_per_second"] / peak
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    table = Table(title=f"{machine()}, toy model, float32; peak {peak / 1e9:.0f} GFLOP/s")
    for name in ("way", "batch", "samples/s", "against naive", "GFLOP/sample", "of peak", "memory"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["way"],
            str(row["batch"]),
            f"{row['samples_per_second']:.2f}",
            f"{row['samples_per_second'] / rows[0]['samples_per_second']:.2f}x",
            f"{row['flops_per_sample'] / 1e9:.2f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['peak_memory_bytes'] / 2**20:.0f} MB",
        )
    console.print(table)
    console.print(f"  {chosen.out}", highlight=False)


if __name__ == "__main__":
    main()
