"""What a GPU can tell, in parts of under 10 minutes each: `benchmarks/run_on_gpu.sh` runs them all.

    python -m benchmarks.gpu ladder|batches|steady|capped|precision [--size sd21|tiny] [--out runs/bench/gpu]

`sd21`: Stable Diffusion 2.1's true configuration with random weights, 512 px, bf16. `tiny`: the same code at tiny
width, which starts on a CPU too (nothing is compiled there, which takes longer than all the rest).

ladder: samples/s and memory at batch 8, from the plain loop in float32 to all that is done, one thing more each time.
batches: the plain loop and ours with batches of 1, 4, 8, 16 and on until memory ends.
steady: 200 steps on one batch: the loss stays finite and falls; then 60 with other dropouts: is anything compiled anew?
capped: `configs/bootpig/sd21_24gb.yaml`'s model trained by Lightning under a cap of 24 GiB, beside the memory counted.
precision: gradients in bf16, ours and the plain loop's, against float32; true size runs in 24 GB on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table

from benchmarks.naive import Naive
from benchmarks.training import DEVICE, SIZES, Ours, autocast, encode, now, prepare
from pig.costs import machine
from pig.data.modules import TripletDataModule
from pig.data.schema import Batch
from pig.data.transforms import ReferenceAugmentation
from pig.methods.bootpig import BootPIG
from pig.training.memory import memory_table

CUDA = DEVICE.type == "cuda"
Row = dict[str, Any]
console = Console(soft_wrap=True)


class Setting:
    """The base model and its data; `batch` gives so many samples, plain or encoded, on the device."""

    def __init__(self, size: str, folder: Path) -> None:
        self.size, self.folder = size, folder
        self.base, self.shards = prepare(size, folder, 64)

    @cached_property
    def encoded(self) -> Path:
        return encode(self.size, self.base, self.shards)

    def batch(self, count: int, encoded: bool = False) -> Batch:
        source = self.encoded if encoded else self.shards
        data = TripletDataModule(str(source), batch_size=count, resolution=SIZES[self.size], num_workers=0)
        return next(iter(data.train_dataloader())).to(DEVICE)


def timed(make: Callable[[], Naive | Ours], batches: Iterable[Batch], half: bool) -> Iterator[Row]:
    """Batch size, samples/s and memory, one by one until memory ends."""
    warm, steps = (3, 10) if CUDA else (1, 1)
    trained = optimizer = None
    try:
        trained = make()
        optimizer = trained.optimizer()
        for batch in batches:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(warm):
                trained.step(optimizer, batch, half)
            began = now()
            for _ in range(steps):
                trained.step(optimizer, batch, half)
            speed = steps * len(batch.keys) / (now() - began)
            most = torch.cuda.max_memory_allocated() if CUDA else 0
            yield {"batch": len(batch.keys), "samples_per_second": speed, "peak_memory_bytes": most}
    except torch.OutOfMemoryError:
        pass
    del trained, optimizer
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def ladder(setting: Setting) -> Iterator[Row]:
    def naive() -> Naive:
        return Naive(setting.base).to(DEVICE)

    def ours(precision: str | None, **model: Any) -> Callable[[], Ours]:
        return lambda: Ours(setting.base, precision, **model)

    half, batch, encoded = "bf16-mixed", setting.batch(8), setting.batch(8, encoded=True)
    rungs: list[tuple[str, Callable[[], Naive | Ours], bool, Batch]] = [
        ("naive, float32", naive, False, batch),
        ("naive, bf16", naive, True, batch),
        ("ours: one pass, stopped early", ours(None), True, batch),
        ("+ frozen bf16, channels_last", ours(half), True, batch),
        ("+ compiled blocks", ours(half, compile=CUDA), True, batch),
        ("+ encoded shards: all", ours(half, compile=CUDA), True, encoded),
        ("all, gradient checkpointing", ours(half, compile=CUDA, gradient_checkpointing=True), True, encoded),
    ]
    for name, make, in_bf16, of in rungs:
        for row in timed(make, [of], in_bf16):
            yield {"way": name, **row}


def batches(setting: Setting) -> Iterator[Row]:
    def ours() -> Ours:
        return Ours(setting.base, "bf16-mixed", compile=CUDA)

    ways: dict[str, tuple[Callable[[], Naive | Ours], bool]] = {
        "ours+precomputed": (ours, True),
        "ours": (ours, False),
        "naive": (lambda: Naive(setting.base).to(DEVICE), False),
    }
    counts = (4, 8, 16, 1, 32, 64) if CUDA else (4, 1)  # 1 is compiled anew
    for way, (make, encoded) in ways.items():
        for row in timed(make, (setting.batch(count, encoded) for count in counts), half=True):
            yield {"way": way, **row}


def steady(setting: Setting) -> Iterator[Row]:
    """First one batch with one noise, then the same pictures with another noise and other dropouts at each step."""
    trained, batch = Ours(setting.base, "bf16-mixed", compile=CUDA), setting.batch(8, encoded=True)
    optimizer, losses, compiled = trained.optimizer(), [], []
    counted = torch._dynamo.utils.counters["stats"]
    fixed, varied = (200, 60) if CUDA else (20, 6)
    for _ in range(fixed):
        losses.append(trained.step(optimizer, batch, half=True))
    for turn in range(varied):
        losses.append(trained.step(optimizer, replace(batch, seeds=batch.seeds + turn), half=True))
        compiled.append(counted["unique_graphs"])
    curve = torch.stack(losses).tolist()
    assert torch.tensor(curve).isfinite().all()
    last = curve[fixed - 1]
    assert last < 0.95 * curve[0]
    late = compiled[-1] - compiled[varied // 2]
    yield {"first": curve[0], "half": curve[fixed // 2], "last": last, "graphs": compiled[-1], "compiled_late": late}


class FromSecondStep(Callback):
    """The most memory that was taken, but for the first step, in which the micro-batch is found at the cap."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if CUDA and trainer.global_step == 1:
            torch.cuda.reset_peak_memory_stats()


def capped(setting: Setting) -> Iterator[Row]:
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(24 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    model: dict[str, Any] = {"gradient_checkpointing": True, "optimizer": "adamw_8bit", "micro_batch": 16}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        model["optimizer"] = "adamw"  # fits as well
    module = BootPIG(setting.base, **model)
    data = TripletDataModule(
        str(setting.encoded),
        batch_size=64 if CUDA else 8,
        resolution=SIZES[setting.size],
        num_workers=0,
        augmentation=ReferenceAugmentation(),
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet["callbacks"] = [FromSecondStep()]
    trainer = Trainer(max_steps=3, precision="bf16-mixed", devices=1, gradient_clip_val=1.0, **quiet)
    trainer.fit(module, data)
    taken = torch.cuda.max_memory_allocated() if CUDA else 0
    counted = memory_table(module.cpu(), data, precision="bf16-mixed", device=DEVICE.type)
    yield {"optimizer is": model["optimizer"], "micro-batch": module.micro_batch, "taken": taken, **counted}


def precision(setting: Setting) -> Iterator[Row]:
    batch = setting.batch(4 if CUDA else 1)
    torch.backends.cudnn.allow_tf32 = False

    def gradients(trained: Naive | Ours, way: str) -> torch.Tensor:
        gc.collect()  # hooks keep the one before alive
        with autocast(way == "bf16-mixed"):
            loss = trained.loss(batch, 0.3, 0.3)
        loss.backward()
        if isinstance(trained, Ours):
            found = {name.removeprefix("net."): p.grad for name, p in trained.module.trainable().items()}
        else:
            found = {name: p.grad for of in trained.groups.values() for name, p in of.items()}
        return torch.cat([found[name].flatten().cpu() for name in sorted(found)])

    exact = gradients(Naive(setting.base).to(DEVICE), "32-true")
    for name, make, way in (
        ("ours, float32", lambda: Ours(setting.base), "32-true"),
        ("naive, bf16", lambda: Naive(setting.base).to(DEVICE), "bf16-mixed"),
        ("ours, bf16", lambda: Ours(setting.base, "bf16-mixed", compile=CUDA), "bf16-mixed"),
    ):
        off = (gradients(make(), way) - exact).norm() / exact.norm()
        yield {"way": name, "relative_difference_of_gradients": float(off)}


PARTS = {"ladder": ladder, "batches": batches, "steady": steady, "capped": capped, "precision": precision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--size", choices=("sd21", "tiny"), default="sd21")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu"))
    chosen = parser.parse_args()
    rows = []
    for row in PARTS[chosen.part](Setting(chosen.size, chosen.out)):
        rows.append(row)  # written at once: a part may run out of time
        (chosen.out / f"{chosen.part}.json").write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8"
        )
    table = Table(*rows[0], title=f"{chosen.part}: {machine()}, {chosen.size}")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
