"""What an image costs: the naive way, ours, and the plain base model with guidance, in one run and as ratios.

    python -m benchmarks.sampling [--steps 10] [--out runs/bench/sampling.json]

One subject, 5 prompts, 1 or 4 images each, 1 and 4 references, on the toy world; and the FLOPs alone (torch's counter,
UNets only, on the meta device) at Stable Diffusion 2.1's true size. The naive way is the authors' release's: for every
image and step one Reference-UNet pass a reference, three Base passes, two of them with 1 + 2 K attention parts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pig import diffusion
from pig.attention.merged import MergedReferences
from pig.costs import SD21, flops_of, machine, peak_memory
from pig.data.transforms import cut_out
from pig.methods.bootpig import BootPIG, BootPIGPipeline, TwoUNet
from pig.models.backbone import decode_latents
from pig.sampling.references import reference_noise
from pig.toyworld import scene

PROMPTS = [f"a photo of a mug, {phrase}" for phrase in list(scene.BACKGROUNDS.values())[:5]]
CASES = [("plain", 0, 1), ("plain", 0, 4)] + [
    (way, references, images) for images in (1, 4) for references in (1, 4) for way in ("naive", "ours")
]


def image_text_guidance(e_uncond: Tensor, e_im: Tensor, e_text_im: Tensor, eta_im: float, eta_text_im: float) -> Tensor:
    """Eq. 4 as it reads, its last bracket corrected."""
    return e_uncond + eta_im * (e_im - e_uncond) + eta_text_im * (e_text_im - e_im)


@torch.no_grad()
def naive(pipeline: BootPIGPipeline, references: list[Any], steps: int, seeds: list[int]) -> Tensor:
    """The pipeline's pictures with fixed noise and the object's caption, drawn one by one by Eq. 3 and 4."""
    model, scheduler, images = pipeline.network, pipeline.scheduler, []
    side = pipeline.base_unet.config.sample_size * 4
    z_ref = pipeline.encode_references([cut_out(one) for one in references], side)
    empty = pipeline.encode_text([""])
    for prompt in PROMPTS:
        text, caption = pipeline.encode_text([prompt]), pipeline.encode_text([prompt.split(",")[0]])
        for seed in seeds:
            scheduler.set_timesteps(steps)
            latents = torch.randn(1, *z_ref.shape[1:], generator=torch.Generator().manual_seed(seed))
            noise = reference_noise(z_ref.shape, 0)
            for t in scheduler.timesteps:
                alpha, sigma = diffusion.alpha_sigma(scheduler.alphas_cumprod, t.view(1))
                z_ref_t = diffusion.add_noise(z_ref, noise, alpha, sigma)
                guided = naive_step(model, latents, z_ref_t, t, text, empty, caption)
                latents = scheduler.step(guided, t, latents, return_dict=False)[0]
            images.append(decode_latents(pipeline.vae, latents))
    return torch.cat(images)


def naive_step(
    model: TwoUNet, latents: Tensor, z_ref_t: Tensor, t: Tensor, text: Tensor, empty: Tensor, caption: Tensor
) -> Tensor:
    """One image, one step. z_ref_t: (K, 4, h, w)."""
    ts = t.view(1)
    each = [model.encode_reference(z[None, None], ts, caption) for z in z_ref_t]
    features = {name: torch.cat([one[name] for one in each], dim=1) for name in each[0]}
    e_uncond, e_im = model(latents, ts, empty), model(latents, ts, empty, features)
    return image_text_guidance(e_uncond, e_im, model(latents, ts, text, features), 5.0, 1.5)


def our_step(
    model: TwoUNet, latents: Tensor, z_ref_t: Tensor, t: Tensor, text: Tensor, empty: Tensor, caption: Tensor
) -> Tensor:
    """One step of all images of a subject, as the pipeline does it."""
    count = len(latents)
    features = model.encode_reference(z_ref_t[None], t.view(1), caption)
    conditions = torch.cat([empty.expand_as(text), empty.expand_as(text), text])
    references = MergedReferences(features, plain=count, branches=2, first_layer=model.layers[0])
    return model.sample(latents.repeat(3, 1, 1, 1), t.expand(3 * count), conditions, references)[0]


def toy_references(count: int) -> list[Image.Image]:
    subject = scene.make_subject(scene.HELD_OUT_SEED, "mug")
    return [Image.fromarray(scene.draw(subject, "sea", i, 64).reference()) for i in range(count)]


def ours(
    pipeline: BootPIGPipeline, pictures: list[Image.Image], images: int, steps: int, more: Mapping[str, Any]
) -> Tensor:
    options: dict[str, Any] = {
        "image_guidance": 5.0,
        "text_guidance": 1.5,
        "reference_noise": "fixed",
        "num_images_per_prompt": images,
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(seed) for _ in PROMPTS for seed in range(images)],
        "output_type": "pt",
    }
    return pipeline(PROMPTS, pictures, **{**options, **more}).images


@torch.no_grad()
def plain(pipeline: BootPIGPipeline, images: int, steps: int) -> None:
    """The base model with classifier-free guidance."""
    text = pipeline.encode_text(PROMPTS).repeat_interleave(images, 0)
    both = torch.cat([pipeline.encode_text([""]).expand_as(text), text])
    pipeline.scheduler.set_timesteps(steps)
    latents = torch.randn(len(text), 4, 16, 16)
    for t in pipeline.scheduler.timesteps:
        e, e_text = pipeline.network(latents.repeat(2, 1, 1, 1), t.expand(len(both)), both).chunk(2)
        latents = pipeline.scheduler.step(e + 3 * (e_text - e), t, latents, return_dict=False)[0]
    for one in latents.split(1):
        decode_latents(pipeline.vae, one)


def measure(way: str, references: int, images: int, steps: int) -> dict[str, Any]:
    """Seconds, FLOPs and peak memory of the toy's pictures, after a warm-up. way: also a rung of `LADDER`."""
    pipeline = BootPIG("toyworld", reference_caption="object").pipeline()
    pictures = toy_references(max(1, references))
    prepare, more = LADDER.get(way, (None, {}))
    if prepare is not None:
        prepare(pipeline)
    draw: Callable[[int], Any] = {
        "plain": lambda steps: plain(pipeline, images, steps),
        "naive": lambda steps: naive(pipeline, pictures, steps, list(range(images))),
    }.get(way, lambda steps: ours(pipeline, pictures, images, steps, more))
    draw(2)
    if way == "naive":  # slow: two steps tell what ten cost
        flops = [flops_of(lambda n=n: draw(n)) for n in (1, 2)]  # type: ignore[misc]
        total = flops[0] + (steps - 1) * (flops[1] - flops[0])
    else:
        total = flops_of(lambda: draw(steps))
    case = {"way": way, "references": references, "images": images}
    return case | cost(lambda: draw(steps), total, len(PROMPTS) * images)


def cost(draw: Callable[[], Any], flops: int, count: int) -> dict[str, Any]:
    """Of an image among `count` that are drawn together: seconds, FLOPs; and the most memory that was taken."""
    began = time.perf_counter()
    draw()
    return {
        "seconds_per_image": (time.perf_counter() - began) / count,
        "flops_per_image": flops / count,
        "peak_memory_bytes": peak_memory(),
    }


def channels_last(pipeline: BootPIGPipeline) -> None:
    for unet in (pipeline.base_unet, pipeline.reference_unet):
        unet.to(memory_format=torch.channels_last)


def compiled(pipeline: BootPIGPipeline) -> None:
    pipeline.base_unet.compile_repeated_blocks()


# What could make it faster: name -> (what is done to the pipeline, options of its call).
LADDER: dict[str, tuple[Callable[[BootPIGPipeline], None] | None, dict[str, Any]]] = {
    "channels_last": (channels_last, {}),
    "torch.compile, repeated blocks": (compiled, {}),
    "equal guidances": (None, {"image_guidance": 3.0, "text_guidance": 3.0}),
    "guidance in the first 60 %": (None, {"guidance_interval": (0.0, 0.6)}),
    "guidance from 20 to 80 %": (None, {"guidance_interval": (0.2, 0.8)}),
    "references every 2nd step": (None, {"reference_every": 2}),
    "deep features every 2nd step": (None, {"deep_every": 2}),
    "deep features every 3rd step": (None, {"deep_every": 3}),
    "guidance from 20 to 80 %, references and deep features every 2nd step": (
        None,
        {"guidance_interval": (0.2, 0.8), "reference_every": 2, "deep_every": 2},
    ),
    "3 / 3, references and deep features every 2nd step": (
        None,
        {"image_guidance": 3.0, "text_guidance": 3.0, "reference_every": 2, "deep_every": 2},
    ),
}


def fused_projections() -> dict[str, float]:
    """Seconds of q, k, v as three products and as one, at the toy's and at SD 2.1's widest attention."""
    found = {}
    for name, tokens, width in (("toy", 20 * 3 * 256, 64), ("SD 2.1", 4 * 4096, 320)):
        x, w = torch.randn(tokens, width), torch.randn(3 * width, width)
        apart = [part.contiguous() for part in w.chunk(3)]
        works: dict[str, Callable[[], Any]] = {
            "three": lambda x=x, apart=apart: [x @ one.T for one in apart],  # type: ignore[misc]
            "one": lambda x=x, w=w: (x @ w.T).chunk(3, dim=-1),  # type: ignore[misc]
        }
        for way, work in works.items():
            work()
            began = time.perf_counter()
            for _ in range(20):
                work()
            found[f"{name}, {way}"] = (time.perf_counter() - began) / 20
    return found


@torch.no_grad()
def count(way: str, references: int, images: int) -> dict[str, Any]:
    """FLOPs of one image's step in the UNets at SD 2.1's size, on the meta device."""
    with torch.device("meta"):
        model = TwoUNet(UNet2DConditionModel(**SD21), UNet2DConditionModel(**SD21))
        total = len(PROMPTS) * images
        latents, text = torch.empty(total, 4, 64, 64), torch.empty(total, 77, 1024)
        z_ref_t, one = torch.empty(max(1, references), 4, 64, 64), torch.empty(1, 77, 1024)
        t = torch.empty((), dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            if way == "plain":
                model(latents.repeat(2, 1, 1, 1), t.expand(2 * total), text.repeat(2, 1, 1))
            elif way == "ours":
                our_step(model, latents, z_ref_t, t, text, one, one)
            else:
                naive_step(model, latents[:1], z_ref_t, t, text[:1], one, one)
    flops = counter.get_total_flops() / (1 if way == "naive" else total)
    return {"way": way, "references": references, "images": images, "flops_per_image": flops, "counted": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sampling.json"))
    chosen = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, (*case, chosen.steps)) for case in CASES]
        ladder = [pool.apply(measure, (rung, 1, 4, chosen.steps)) for rung in ("plain", "ours", *LADDER)]
    counted = [count(*case) for case in CASES]
    console = Console()
    for title, part in (("toy world, measured", rows), ("SD 2.1, counted, UNets, one step", counted)):
        table = Table(
            "images", "references", "way", "s/image", "x naive", "GFLOP/image", "x plain", "peak", title=title
        )
        by_case = {(row["way"], row["references"], row["images"]): row for row in part}
        for (way, references, images), row in by_case.items():
            plain, slow = by_case["plain", 0, images], by_case.get(("naive", references, images))
            faster = (
                f"{slow['seconds_per_image'] / row['seconds_per_image']:.2f}"
                if slow and "seconds_per_image" in row
                else ""
            )
            table.add_row(
                str(images),
                str(references),
                way,
                f"{row['seconds_per_image']:.3f}" if "seconds_per_image" in row else "",
                faster,
                f"{row['flops_per_image'] / 1e9:.1f}",
                f"{row['flops_per_image'] / plain['flops_per_image']:.2f}",
                f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in row else "",
            )
        console.print(table)
    table = Table("", "s/image", "GFLOP/image", "x plain: time", "FLOPs", title="1 reference, 4 images a prompt")
    for row in ladder:
        times, flops = (row[key] / ladder[0][key] for key in ("seconds_per_image", "flops_per_image"))
        own = (f"{row['seconds_per_image']:.3f}", f"{row['flops_per_image'] / 1e9:.1f}")
        table.add_row(row["way"], *own, f"{times:.2f}", f"{flops:.2f}")
    console.print(table)
    fused = fused_projections()
    for name, seconds in fused.items():
        console.print(f"q, k, v at the size of {name} product(s): {1000 * seconds:.2f} ms")
    found = {"machine": machine(), "rows": rows + counted, "ladder": ladder, "fused": fused}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(chosen.out)


if __name__ == "__main__":
    main()
