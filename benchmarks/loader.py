"""What the loader gives: samples/s of one core at 512 px, and where its time goes.

    python -m benchmarks.loader [--shards DIR] [--samples 200] [--out runs/bench/loader.json]

Without --shards on drawn triplets, both plain and encoded at Stable Diffusion's sizes. One thread, one process: a run's
`data.num_workers` multiply it. What an H200 needs: 60 samples/s with the encoders online, 89 with encoded shards.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_gen.toyworld import draw_triplets
from pig.costs import machine
from pig.data.encoded import EncodedTriplet, decode_encoded, encoded_members
from pig.data.modules import TripletDataModule
from pig.data.shards import decode_triplet, find_shards, read_shard, write_samples
from pig.data.transforms import ReferenceAugmentation, target_picture, to_tensor

NEEDED = {"triplets": 60, "encoded": 89}  # samples/s of an H200, the goals
SIZE, BATCH = 512, 8


class Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        return result


def stages(shards: Path) -> dict[str, float]:
    """Seconds of each stage, over all samples, as the loader goes through them."""
    clock, augment, tensors = Clock(), ReferenceAugmentation(), []
    for shard in find_shards(str(shards))[0]:
        raws = iter(read_shard(shard))
        decode = decode_encoded if shard.stats.encoded else decode_triplet
        for index in range(shard.stats.count):
            raw = clock("read", next, raws)
            sample, rng = clock("decode", decode, raw), np.random.default_rng(index)
            reference = clock("augment", augment, sample.reference, SIZE, rng)
            tensors.append([clock("collate", to_tensor, reference)])
            if isinstance(sample, EncodedTriplet):
                tensors[-1] += [torch.from_numpy(sample.target), torch.from_numpy(sample.text)]
            else:
                target = clock("resize", target_picture, sample.target, SIZE)
                tensors[-1].append(clock("collate", to_tensor, target))
            if len(tensors) == BATCH:
                for column in zip(*tensors, strict=True):
                    clock("collate", torch.stack, column)
                tensors.clear()
    return clock.seconds


def speed(shards: Path) -> float:
    """samples/s of the loader itself."""
    data = TripletDataModule(str(shards), batch_size=BATCH, resolution=SIZE, num_workers=0)
    loader = data.train_dataloader()
    count = sum(len(batch.keys) for batch in loader)  # warms up: files and code
    began = time.perf_counter()
    for _ in loader:
        pass
    return count / (time.perf_counter() - began)


def as_if_encoded(shards: Path, out: Path) -> None:
    """Arrays of Stable Diffusion 2.1's sizes in place of what its encoders would give."""

    def samples() -> Iterator[dict[str, Any]]:
        for shard in find_shards(str(shards))[0]:
            for raw in read_shard(shard):
                triplet, rng = decode_triplet(raw), np.random.default_rng(0)  # type: ignore[arg-type]
                arrays = (rng.standard_normal(shape, np.float32) for shape in ((8, SIZE // 8, SIZE // 8), (77, 1024)))
                told = (triplet.caption, triplet.object, triplet.metadata)
                encoded = EncodedTriplet(triplet.key, *arrays, triplet.reference, *told)
                yield encoded_members(encoded, raw["reference.png"])  # type: ignore[index]

    identity = {"base": "random", "resolution": SIZE, "variants": 0, "augmentation": None, "dtype": "float32"}
    write_samples(out / "train-000000.tar", samples(), None, identity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/loader.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    shards, encoded = chosen.shards or chosen.out.parent / "triplets_512", chosen.out.parent / "encoded_512"
    if not chosen.shards:
        draw_triplets(shards, chosen.samples, SIZE, per_shard=chosen.samples)
    as_if_encoded(shards, encoded)
    rows = []
    for name, folder in (("triplets", shards), ("encoded", encoded)):
        seconds, rate = stages(folder), speed(folder)
        shares = {stage: taken / sum(seconds.values()) for stage, taken in seconds.items()}
        rows.append({"inputs": name, "samples_per_second": rate, "needed": NEEDED[name], "shares": shares})
    chosen.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1), encoding="utf-8")
    stages_ = ("read", "decode", "resize", "augment", "collate")
    columns = ("inputs", "samples/s of a core", "16 cores against an H200", *stages_)
    table = Table(*columns, title=f"{machine()}, {SIZE} px")
    for row in rows:
        shares = (f"{row['shares'].get(stage, 0):.0%}" for stage in stages_)
        times = 16 * row["samples_per_second"] / row["needed"]
        table.add_row(row["inputs"], f"{row['samples_per_second']:.1f}", f"{times:.1f}x", *shares)
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    main()
