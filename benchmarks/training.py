"""What a training sample costs: Algorithm 1 written plainly with diffusers, ours, and ours on encoded shards.

    python -m benchmarks.training [--size toy|sd21|tiny] [--batch 32] [--steps 5] [--precision bf16-mixed|32-true]
        [--ways naive ours ours+precomputed] [--out runs/bench/training.json]

The same precision in all rows. `toy`: the toy model at 64 px; `sd21`: Stable Diffusion 2.1's true configuration at 512
px with random weights, the default on a GPU; `tiny`: the same code at tiny width. FLOPs by torch's counter, the
machine's peak by a large product.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.naive import RATES, Naive
from benchmarks.random_weights import SD21, random_base, random_networks
from data_gen.encode import encode_shards
from data_gen.toyworld import draw_triplets
from pig.costs import flops_of, machine, peak_memory
from pig.data.modules import TripletDataModule
from pig.data.schema import Batch
from pig.data.transforms import ReferenceAugmentation
from pig.methods.bootpig import BootPIG, TwoUNet
from pig.models.backbone import fast_precision
from pig.training.module import PRECISIONS
from pig.training.optimizers import lay_out

WAYS = ("naive", "ours", "ours+precomputed")
SIZES = {"toy": 64, "sd21": 512, "tiny": 64}  # resolution
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 3 if DEVICE.type == "cpu" else 1  # what else a CPU does shows
PRECISION = fast_precision(DEVICE.type)
COMPILED = DEVICE.type == "cuda"  # on CPUs it gains nothing
console = Console(soft_wrap=True)


class Ours:
    """`BootPIG` as Lightning drives it, without Lightning: one step of its loss, its optimizer and clipping."""

    def __init__(self, base: str, precision: str | None = "32-true", **settings: Any) -> None:
        self.module = BootPIG(base, lr_reference=RATES["reference_unet"], lr_rsa=RATES["rsa"], **settings).to(DEVICE)
        _ = self.module.encoders_digest
        if precision:
            lay_out(self.module, precision, DEVICE)

    def optimizer(self) -> torch.optim.Optimizer:
        return self.module.configure_optimizers()

    def loss(self, batch: Batch, reference_dropout: float, caption_dropout: float) -> Tensor:
        self.module.dropout = {"reference": reference_dropout, "caption": caption_dropout}
        return self.module.losses(batch, training=True)[0].mean()

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, half: bool, dropout: float = 0.15) -> Tensor:
        size, losses = len(batch.keys), []
        for part in self.module.micro_batches(batch):
            with autocast(half):
                loss = self.loss(part, dropout, dropout) * (len(part.keys) / size)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(list(self.module.trainable().values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).sum()


def autocast(half: bool) -> Any:
    """As Lightning has it; to be left before the next step, as it may keep what it made of the weights."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=half, cache_enabled=False)


class Stages:
    """Seconds of each part of a step, by hooks. (On a GPU the hooks wait, so the sum is more than a step.)"""

    def __init__(self, trained: Naive | Ours) -> None:
        self.seconds: dict[str, float] = {}
        module = trained.module if isinstance(trained, Ours) else trained
        net = trained.module.net if isinstance(trained, Ours) else trained
        parts = {"VAE": module.vae.encoder, "text": module.text_encoder}
        for name, part in (parts | {"Reference UNet": net.reference_unet, "Base UNet": net.base_unet}).items():
            part.register_forward_pre_hook(lambda *_, name=name: self.start(name))
            part.register_forward_hook(lambda *_, name=name: self.stop(name), always_call=True)

    def start(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) - now()

    def stop(self, name: str) -> None:
        self.seconds[name] += now()


def now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def load(shards: Path, chosen: argparse.Namespace) -> tuple[list[Batch], float]:
    """Batches as training gets them, and one process's seconds for each."""
    data = TripletDataModule(str(shards), batch_size=chosen.batch, resolution=SIZES[chosen.size], num_workers=0)
    loader, began = iter(data.train_dataloader()), time.perf_counter()
    batches = [next(loader) for _ in range(chosen.steps)]
    return batches, (time.perf_counter() - began) / chosen.steps


class Run:
    """One way of training, ready to step."""

    def __init__(self, way: str, base: str, batches: list[Batch], precision: str) -> None:
        self.trained = Naive(base).to(DEVICE) if way == "naive" else Ours(base, precision, compile=COMPILED)
        self.batches, self.half = [batch.to(DEVICE) for batch in batches], precision == "bf16-mixed"
        self.optimizer = self.trained.optimizer()

    def timed_step(self, turn: int) -> float:
        began = now()
        self.trained.step(self.optimizer, self.batches[turn], self.half)
        return now() - began

    def measure(self) -> dict[str, Any]:
        """FLOPs of a step, its stages, and the most memory it took; after some steps."""
        size, steps, most = len(self.batches[0].keys), len(self.batches), peak_memory()
        flops = [flops_of(partial(self.trained.step, self.optimizer, one, self.half)) for one in self.batches]
        stages = Stages(self.trained)
        for one in self.batches:
            stages.start("forward")
            with autocast(self.half):
                loss = self.trained.loss(one, 0.15, 0.15)
            stages.stop("forward")
            stages.start("backward")
            loss.backward()
            stages.stop("backward")
            stages.start("optimizer")
            self.optimizer.step()
            self.optimizer.zero_grad()
            stages.stop("optimizer")
        seconds = {name: taken / steps / size for name, taken in stages.seconds.items()}
        parts = {"VAE", "text", "Reference UNet", "Base UNet"} & set(seconds)
        seconds["rest"] = seconds.pop("forward") - sum(seconds[part] for part in parts)
        return {
            "batch": size,
            "flops_per_sample": sum(flops) / len(flops) / size,
            "peak_memory_bytes": most,
            "seconds_per_sample": seconds,
        }


class Worker:
    """A Run in a process of its own, so that neither memory nor caches of another are in its figures."""

    def __init__(self, *of: Any) -> None:
        self.pool = multiprocessing.get_context("spawn").Pool(1, _start, of)

    def __call__(self, method: str, *arguments: Any) -> Any:
        return self.pool.apply(_call, (method, arguments))

    def stop(self) -> None:
        self.pool.terminate()


def _start(*of: Any) -> None:
    global _run
    _run = Run(*of)


def _call(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_run, method)(*arguments)


def measure_all(base: str, batches: dict[str, list[Batch]], precision: str, at_once: bool) -> list[dict[str, Any]]:
    """A row for each way. `at_once`: they take turns, so that what else the machine does strikes all alike."""
    rows = []
    for ways in [list(batches)] if at_once else [[way] for way in batches]:
        workers = {way: Worker(way, base, batches[way], precision) for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        steps = len(batches[ways[0]])
        for turn in [*range(steps)] * (1 + ROUNDS):  # the first round warms up: every size is new to the kernels once
            for way, worker in workers.items():
                seconds[way].append(worker("timed_step", turn))
        for way, worker in workers.items():
            rows.append({"way": way, "seconds": median(seconds[way][steps:]), **worker("measure")})
            worker.stop()
    return rows


def measured_peak(precision: str) -> float:
    """FLOP/s of a large product on this machine, the best of several."""
    size, times = (8192, 20) if DEVICE.type == "cuda" else (2048, 8)
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    a @ a
    seconds = []
    for _ in range(times):
        began = now()
        a @ a
        seconds.append(now() - began)
    return 2 * size**3 / min(seconds)


def prepare(size: str, folder: Path, count: int) -> tuple[str, Path]:
    """The base model, and triplets."""
    base, shards = "toyworld", folder / f"triplets_{size}_{count}"
    if size != "toy":
        base = str(folder / f"base_{size}")
        if not (folder / f"base_{size}/model_index.json").exists():
            random_base(size).save_pretrained(base)
    draw_triplets(shards, count, SIZES[size], per_shard=count)
    return base, shards


def encode(size: str, base: str, shards: Path) -> Path:
    """The same encoded, with one variant of each reference."""
    encoded = shards.with_name(f"encoded_{shards.name}")
    encode_shards([str(shards)], base, encoded, SIZES[size], 1, ReferenceAugmentation(), half=False)
    return encoded


def counted() -> dict[str, float]:
    """TFLOP of each part of a training sample at Stable Diffusion 2.1's size, 512 px, on the meta device."""
    with torch.device("meta"):
        unet, vae, text_encoder = random_networks(SD21, 49408)
        plain = UNet2DConditionModel.from_config(unet.config)
        net = TwoUNet(unet, copy.deepcopy(plain)).requires_grad_(False)
        for of in net.trainable_parameters().values():
            for parameter in of.values():
                parameter.requires_grad_(True)
        z, t, text, ids = torch.randn(1, 4, 64, 64), torch.zeros(1).long(), torch.randn(1, 77, 1024), torch.zeros(1, 77)
        picture = torch.randn(1, 3, 512, 512)
        with torch.no_grad():
            found = {
                "VAE, one picture": flops_of(lambda: vae.encode(picture)),
                "text, one caption": flops_of(lambda: text_encoder(ids.long())),
                "Reference UNet": flops_of(lambda: net.encode_reference(z[:, None], t, text)),
                "Reference UNet to its end": flops_of(lambda: plain(z, t, text)),
            }
            found["both UNets"] = flops_of(lambda: net(z, t, text, net.encode_reference(z[:, None], t, text)))

        def step() -> None:
            net(z, t, text, net.encode_reference(z[:, None], t, text)).square().mean().backward()

        found["backward"] = flops_of(step) - found["both UNets"]
    return {name: flops / 1e12 for name, flops in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpu = DEVICE.type == "cpu"
    parser.add_argument("--size", choices=SIZES, default="toy" if cpu else "sd21")
    parser.add_argument("--batch", type=int, default=32 if cpu else 8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISION)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/training.json"))
    chosen = parser.parse_args()
    base, shards = prepare(chosen.size, chosen.out.parent, chosen.batch * chosen.steps)
    of = {way: encode(chosen.size, base, shards) if way == "ours+precomputed" else shards for way in chosen.ways}
    peak = measured_peak(chosen.precision)
    loaded = {way: load(shards, chosen) for way, shards in of.items()}
    batches = {way: of for way, (of, _) in loaded.items()}
    rows = measure_all(base, batches, chosen.precision, at_once=cpu and chosen.size != "sd21")
    for row in rows:
        loading = loaded[row["way"]][1] if cpu else 0.0  # beside a GPU other processes load meanwhile
        row["samples_per_second"] = chosen.batch / (row.pop("seconds") + loading)
        row["seconds_per_sample"]["loader"] = loading / chosen.batch
        row["share_of_peak"] = row["flops_per_sample"] * row["samples_per_second"] / peak
        row["precision"] = chosen.precision
    chosen.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")
    title = f"{machine()}, {chosen.size}, {chosen.precision}; GFLOP of a sample; peak {peak / 1e9:.0f} GFLOP/s"
    columns = ("way", "batch", "samples/s", "speed", "GFLOP", "of peak", "memory")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(
            row["way"],
            str(row["batch"]),
            f"{row['samples_per_second']:.4g}",
            f"{row['samples_per_second'] / rows[0]['samples_per_second']:.2f}x",
            f"{row['flops_per_sample'] / 1e9:.2f}",
            f"{row['share_of_peak']:.0%}",
            f"{row['peak_memory_bytes'] / 2**20:.0f} MB",
        )
    console.print(table)
    stages = ["loader", "VAE", "text", "Reference UNet", "Base UNet", "backward", "optimizer", "rest"]
    table = Table("ms per sample", *(row["way"] for row in rows))
    for stage in stages:
        table.add_row(stage, *(f"{1000 * row['seconds_per_sample'].get(stage, 0.0):,.2f}" for row in rows))
    console.print(table)
    sd21 = counted()
    console.print("TFLOP at Stable Diffusion 2.1's size: " + ", ".join(f"{n} {v:.3f}" for n, v in sd21.items()))
    console.print(f"  {chosen.out}", highlight=False)


if __name__ == "__main__":
    main()
