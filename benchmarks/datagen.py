"""Data generation by stage: samples/s and peak memory, one picture at a time in float32 against batches as shipped.

    python benchmarks/datagen.py [--samples 32] [--out runs/bench/datagen.json]

On the CPU: the toy world's models. On a GPU: Stable Diffusion 2.1's architecture at 512 px (25 steps) and SAM ViT-H,
both with random weights, in bf16 and compiled. Each measurement has a process of its own, so that memory peaks do not
add up.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from segment_anything import sam_model_registry

from benchmarks.random_weights import random_base
from data_gen.captions import grammar_captions
from data_gen.config import DatagenConfig, load_config
from data_gen.images import Painter
from data_gen.masks import make_segmenter
from data_gen.samples import Sample, batches
from pig.costs import machine
from pig.models.encoders import load_clip
from pig.models.segmenters import encode

CONFIG = Path("configs/datagen/toyworld.yaml")
STAGES = ("images", "masks", "quality")
GPU = torch.cuda.is_available()

Work = Callable[[int], None]  # does the stage's work for so many samples


def samples(config: DatagenConfig, count: int) -> list[Sample]:
    rows = grammar_captions(replace(config.captions, count=count), seed=0)
    return [Sample(f"{i}", row.caption, row.object, i) for i, row in enumerate(rows)]


def images_work(config: DatagenConfig, ours: bool) -> Work:
    if not GPU:
        painter = Painter(config.images, "cpu")
    else:
        dtype = torch.bfloat16 if ours else torch.float32
        painter = Painter.__new__(Painter)
        painter.config = replace(config.images, size=512, steps=25, guidance=7.5)
        painter.pipeline = random_base("sd21").to("cuda", dtype)
        painter.pipeline.set_progress_bar_config(disable=True)
        if ours:
            painter.pipeline.unet.compile_repeated_blocks()
    size = config.images.batch_size if ours else 1

    def work(count: int) -> None:
        for batch in batches(samples(config, count), size):
            painter.draw(batch)

    return work


def masks_work(config: DatagenConfig, ours: bool) -> Work:
    size, rng = config.masks.batch_size if ours else 1, np.random.default_rng(0)
    if GPU:  # the encoder is where SAM's time goes
        sam = sam_model_registry["vit_h"]().cuda().eval()
        if ours:
            sam.image_encoder.compile()
        picture = rng.integers(0, 255, (512, 512, 3), dtype=np.uint8)

        def encoding(count: int) -> None:
            for batch in batches([picture] * count, size):
                encode(sam, batch, torch.bfloat16 if ours else torch.float32)

        return encoding
    segmenter, painted = make_segmenter(config.masks, "cpu"), Painter(replace(config.images, steps=4), "cpu")
    rows = samples(config, size)
    pictures = painted.draw(rows)[0]

    def work(count: int) -> None:
        for batch in batches(list(range(count)), size):
            segmenter.find(pictures[: len(batch)], [row.object for row in rows[: len(batch)]])

    return work


def quality_work(config: DatagenConfig, ours: bool) -> Work:
    clip, size = load_clip(config.quality.clip, "cuda" if GPU else "cpu"), config.quality.batch_size if ours else 1
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))

    def work(count: int) -> None:
        for batch in batches(samples(config, count), size):
            for _ in range(2):  # picture and cut-out, caption and phrase
                clip.images([picture] * len(batch))
                clip.texts([sample.caption for sample in batch])

    return work


def measure(stage: str, ours: bool, count: int) -> dict[str, Any]:
    """Samples a second and peak bytes of one stage, after a warm-up of one batch."""
    config = load_config(CONFIG, [])
    torch.set_num_threads(config.threads)
    work = {"images": images_work, "masks": masks_work, "quality": quality_work}[stage](config, ours)
    batch = {"images": config.images, "masks": config.masks, "quality": config.quality}[stage].batch_size
    work(batch if ours else 1)
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work(count)
    if GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    way = "batched" if ours else "one by one"
    return {"stage": stage, "way": way, "samples_per_second": count / seconds, "peak_memory_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/datagen.json"))
    chosen = parser.parse_args()
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for stage in STAGES:
            for ours in (False, True):
                rows.append(pool.apply(measure, (stage, ours, chosen.samples)))
    table = Table("stage", "way", "samples/s", "ratio", "peak memory", title=f"data generation on {machine()}")
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        for row in (before, after):
            ratio = row["samples_per_second"] / before["samples_per_second"]
            memory = f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
            table.add_row(row["stage"], row["way"], f"{row['samples_per_second']:.2f}", f"{ratio:.2f}", memory)
    Console().print(table)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")
    print(chosen.out)


if __name__ == "__main__":
    main()
