"""What an image of EZIGen costs: the release's way, ours, and the plain base model with guidance, and as ratios.

    python -m benchmarks.ezigen [--steps 10] [--out runs/bench/ezigen.json]

The release's way, by its public code: two UNets, of which the second reads the reference for each image, to its end;
each image by itself; in every transfer step all adapters project the reference's keys and values again, for both
branches of the guidance; each loop goes through the VAE. One pass is a run of all steps with the adapters on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.sampling import PROMPTS, cost, toy_references
from pig import diffusion
from pig.attention.adapters import ScaledReferences
from pig.costs import SD21, flops_of, machine
from pig.data.transforms import cut_out
from pig.methods.ezigen import EZIGen, EZIGenNet, EZIGenPipeline
from pig.methods.ezigen.pipeline import reference_prompt
from pig.models.backbone import decode_latents, encode_images
from pig.sampling.references import reference_noise

GUIDANCE, LAYOUT, LOOPS = 7.5, 0.6, 3
# Row -> settings of the pipeline; for the release's way how many runs of which steps.
WHATS: dict[str, dict[str, Any]] = {
    "one pass, transfer everywhere": {"transfer_everywhere": True},
    "layout 60 %, one pass": {"layout_share": LAYOUT, "loops": 0},
    "layout 60 %, 3 loops": {"layout_share": LAYOUT, "loops": LOOPS},
}
CASES = [(what, way, images) for what in WHATS for images in (1, 4) for way in ("plain", "naive", "ours")]


def read_to_the_end(net: EZIGenNet, z_ref: Tensor, text: Tensor, alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """The features by a whole pass of the second UNet. z_ref: (K, 4, h, w)."""
    t = torch.ones(1, dtype=torch.long)
    alpha, sigma = diffusion.alpha_sigma(alphas_cumprod, t)
    noised = diffusion.add_noise(z_ref, reference_noise(z_ref.shape, 0), alpha, sigma)
    found: dict[str, Tensor] = {}
    hooks = [
        net.unet.get_submodule(f"{block}.norm1").register_forward_hook(
            lambda module, given, out, block=block: found.update({block: out[None]})
        )
        for block in net.adapters.by_block()
    ]
    net.unet(noised, t.expand(len(z_ref)), text.expand(len(z_ref), -1, -1))
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def naive(pipe: EZIGenPipeline, references: list[Any], what: str, steps: int, seeds: list[int]) -> Tensor:
    """The pipeline's pictures, drawn one by one."""
    net, scheduler, images = pipe.network, pipe.scheduler_of(pipe.settings(num_inference_steps=steps)), []
    z_ref = pipe.encode_references([cut_out(one) for one in references], pipe.native_size)
    empty, told = pipe.encode_text([""]), pipe.encode_text([reference_prompt("mug")])
    first = 0 if "transfer_everywhere" in WHATS[what] else round(LAYOUT * steps)
    for prompt in PROMPTS:
        text = pipe.encode_text([prompt])
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            features = read_to_the_end(net, z_ref, told, scheduler.alphas_cumprod)
            latents = torch.randn(1, *z_ref.shape[1:], generator=generator)
            for loop in range(1 + WHATS[what].get("loops", 0)):
                if loop:
                    latents = encode_images(pipe.vae, decode_latents(pipe.vae, latents))
                    noise = torch.randn(latents.shape, generator=generator)
                    latents = scheduler.add_noise(latents, noise, scheduler.timesteps[first].view(1))
                for step in range(first if loop else 0, steps):
                    t = scheduler.timesteps[step].view(1)
                    there = features if step >= first else None
                    e, e_text = (net(latents, t, one, there) for one in (empty, text))
                    guided = e + GUIDANCE * (e_text - e)
                    latents = scheduler.step(guided, t[0], latents, generator=generator).prev_sample
            images.append(decode_latents(pipe.vae, latents))
    return torch.cat(images)


def ours(pipe: EZIGenPipeline, references: list[Any], settings: dict[str, Any], steps: int, images: int) -> Tensor:
    return pipe(
        PROMPTS,
        references,
        class_noun="mug",
        text_guidance=GUIDANCE,
        num_inference_steps=steps,
        num_images_per_prompt=images,
        generator=[torch.Generator().manual_seed(seed) for _ in PROMPTS for seed in range(images)],
        output_type="pt",
        **settings,
    ).images


def measure(what: str, way: str, images: int, steps: int) -> dict[str, Any]:
    """Seconds, FLOPs and peak memory of the toy's pictures with one reference, after a warm-up."""
    torch.manual_seed(0)
    pipe, references = EZIGen("toyworld", loops=0).pipeline(), toy_references(1)
    draw: Callable[[int], Any] = {
        "plain": lambda steps: ours(pipe, references, {"adapter_scale": 0.0}, steps, images),
        "naive": lambda steps: naive(pipe, references, what, steps, list(range(images))),
        "ours": lambda steps: ours(pipe, references, WHATS[what], steps, images),
    }[way]
    draw(5)
    total = flops_of(lambda: draw(steps))
    case = {"what": what, "way": way, "images": images}
    return case | cost(lambda: draw(steps), total, len(PROMPTS) * images)


@torch.no_grad()
def count(what: str, images: int, steps: int = 50) -> list[dict[str, Any]]:
    """FLOPs of one image in the UNets at SD 2.1's size, each way, on the meta device: steps of each kind, times their
    number."""
    total, first = len(PROMPTS) * images, 0 if "transfer_everywhere" in WHATS[what] else round(LAYOUT * steps)
    transfers = (steps - first) * (1 + WHATS[what].get("loops", 0))
    with torch.device("meta"):
        net = EZIGenNet(UNet2DConditionModel(**SD21))
        latents, text = torch.empty(total, 4, 64, 64), torch.empty(total, 77, 1024)
        z_ref, t, told = torch.empty(1, 1, 4, 64, 64), torch.empty(1, dtype=torch.long), torch.empty(1, 1, 77, 1024)
        both = (latents.repeat(2, 1, 1, 1), t.expand(2 * total), text.repeat(2, 1, 1))
        plain = flops_of(lambda: net(*both))
        whole = flops_of(lambda: net.unet(z_ref[0], t, told[0]))
        reading = flops_of(lambda: net.encode_reference(z_ref, t, told))
        features = net.encode_reference(z_ref, t, told)
        references = ScaledReferences(features, branches=2)
        with_projection = flops_of(lambda: net(*both, references))
        later = flops_of(lambda: net(*both, references))
        alone = flops_of(lambda: net(latents[:1], t, text[:1], features))
    found = {
        "plain": steps * plain / total,
        "naive": whole + first * plain / total + 2 * transfers * alone,
        "ours": (reading + (with_projection - later) + first * plain + transfers * later) / total,
    }
    return [
        {"what": what, "way": way, "images": images, "flops_per_image": flops, "counted": True}
        for way, flops in found.items()
    ]


def encoded_features() -> dict[str, float]:
    """What it would take and spare to keep a triplet's features in shards, at SD 2.1's size: bytes in half precision,
    FLOPs of reading, FLOPs of a training step of one sample without it (UNets only)."""
    with torch.device("meta"):
        net = EZIGenNet(UNet2DConditionModel(**SD21))
        net.unet.requires_grad_(False)
        z, text, t = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 1024), torch.empty(1, dtype=torch.long)
        with torch.no_grad():
            reading = flops_of(lambda: net.encode_reference(z[None], t, text[None]))
            features = net.encode_reference(z[None], t, text[None])
        step = flops_of(lambda: net(z, t, text, features).sum().backward())
    size = 2 * sum(f.numel() for f in features.values())
    return {"bytes": size, "reading_flops": reading, "step_flops": step}


def show(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    table = Table("", "images", "way", "s/image", "x naive", "GFLOP/image", "x plain", "peak", title=title)
    by_case = {(row["what"], row["way"], row["images"]): row for row in rows}
    for (what, way, images), row in by_case.items():
        plain, slow = by_case[what, "plain", images], by_case[what, "naive", images]
        timed = "seconds_per_image" in row
        table.add_row(
            what,
            str(images),
            way,
            f"{row['seconds_per_image']:.3f}" if timed else "",
            f"{slow['seconds_per_image'] / row['seconds_per_image']:.2f}" if timed else "",
            f"{row['flops_per_image'] / 1e9:.1f}",
            f"{row['flops_per_image'] / plain['flops_per_image']:.3f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if timed else "",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/ezigen.json"))
    chosen = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, (*case, chosen.steps)) for case in CASES]
    counted = [row for what in WHATS for images in (1, 4) for row in count(what, images)]
    console = Console()
    show(console, rows, f"toy world, measured, {chosen.steps} steps, 1 reference")
    show(console, counted, "SD 2.1, counted, UNets, 50 steps, 1 reference")
    encoded = encoded_features()
    spared = encoded["reading_flops"] / (encoded["reading_flops"] + encoded["step_flops"])
    console.print(
        f"features of a triplet kept in shards, SD 2.1: {encoded['bytes'] / 1e6:.1f} MB each, "
        f"{encoded['bytes'] * 2e5 / 1e12:.1f} TB for 200,000; spares {spared:.0%} of a training step's FLOPs"
    )
    found = {"machine": machine(), "rows": rows + counted, "encoded_features": encoded}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(chosen.out)


if __name__ == "__main__":
    main()
