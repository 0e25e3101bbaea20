"""What CLIP and DINO see in picture files, kept by the files' contents, so that no picture is looked at twice."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pig.data.subjects import Segment, find_object, mask_path
from pig.data.transforms import WHITE, load_image
from pig.errors import InputError
from pig.files import make_folder
from pig.models.encoders import Clip, ImageEncoder

THUMBNAIL = 160  # pixels, the longer side
console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Looked:
    """One picture file. `features`: name (`clip`, `dino`; `clip_masked`, `dino_masked` where an object was found) ->
    (D,), unit length. `size`: (width, height). `key`: of its contents, and its thumbnail's name."""

    key: str
    features: Mapping[str, Tensor]
    size: tuple[int, int]


@dataclass(frozen=True)
class Decoded:
    """`picture`: kept only where its object must still be found; `mask`: its own."""

    key: str
    size: tuple[int, int]
    pixels: Mapping[str, Tensor]  # of each encoder
    noun: str
    picture: Image.Image | None
    mask: Image.Image | None


def is_unit(feature: Tensor) -> bool:
    """A feature as it is stored: float32, of length 1."""
    return feature.dtype == torch.float32 and abs(float(feature.norm()) - 1) < 1e-3


class Embedder:
    """Looks at picture files through CLIP and DINO, and with a segmenter also at their objects alone, on white.

    What was found is kept in `folder`, a file per batch, so that a run that was killed goes on; so are thumbnails.
    Started by torchrun, each process looks at its share.
    """

    def __init__(
        self, clip: Clip, dino: ImageEncoder, folder: Path, segment: Segment | None = None, batch_size: int = 32
    ) -> None:
        self.segment, self.batch_size = segment, batch_size
        self.encoders = {"clip": clip, "dino": dino}
        segmenter = None if segment is None else segment.identity
        networks = json.dumps([clip.identity, dino.identity, segmenter], sort_keys=True)
        self.store = folder / "embeddings" / hashlib.sha256(networks.encode()).hexdigest()[:16]
        self.thumbnails = folder / "thumbnails"
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def __call__(self, files: Mapping[Path, str]) -> tuple[dict[Path, Looked], dict[Path, str]]:
        """files: path -> the noun of what it shows. Returns what was seen, and of unreadable files why."""
        for folder in (self.store, self.thumbnails):
            make_folder(folder)
        kept = self._read_store()
        with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 1))) as pool:
            found = dict(zip(files, pool.map(self._key, files, files.values()), strict=True))
            bad = {path: key[1:] for path, key in found.items() if key.startswith("!")}
            keys = {path: key for path, key in found.items() if path not in bad}
            todo = {key: path for path, key in reversed(keys.items()) if key not in kept}
            # By the key, not by position: another process may have stored some of its own already.
            share = sorted((path, key) for key, path in todo.items() if int(key, 16) % self.world == self.rank)
            broken = self._look(share, files, pool)
        if self.world > 1:
            broken = self._gather(broken)
        kept = self._read_store() if todo else kept
        bad |= {path: broken[key] for path, key in keys.items() if key in broken}
        return {path: kept[key] for path, key in keys.items() if key not in broken}, bad

    def _key(self, path: Path, noun: str) -> str:
        """sha256 of all that a file's features depend on; with `!` in front, why it cannot be read."""
        try:
            contents = hashlib.sha256(path.read_bytes())
            if self.segment is not None:
                mask = mask_path(path)
                contents.update(noun.encode() + (mask.read_bytes() if mask.exists() else b""))
        except OSError as error:
            return f"!{error.strerror}"
        return contents.hexdigest()[:32]

    def _look(
        self, share: Sequence[tuple[Path, str]], files: Mapping[Path, str], pool: ThreadPoolExecutor
    ) -> dict[str, str]:
        """Look at these files and store what is seen; key -> reason of those that cannot be read."""
        broken: dict[str, str] = {}
        if not share:
            return broken
        batches = [share[at : at + self.batch_size] for at in range(0, len(share), self.batch_size)]
        began = time.perf_counter()
        with self._progress(len(share)) as advance:
            waiting = [pool.submit(self._decode, path, key, files[path]) for path, key in batches[0]]
            for number, batch in enumerate(batches):
                decoded = [one.result() for one in waiting]
                following = batches[number + 1] if number + 1 < len(batches) else ()
                waiting = [pool.submit(self._decode, path, key, files[path]) for path, key in following]
                broken |= {key: one for (_, key), one in zip(batch, decoded, strict=True) if isinstance(one, str)}
                broken |= self._embed([one for one in decoded if isinstance(one, Decoded)])
                advance(len(batch))
                if number == 0 and len(batches) > 2 and self.rank == 0:
                    minutes = (time.perf_counter() - began) / len(batch) * len(share) / 60
                    console.print(f"{len(share)} pictures to look at, on this machine about {minutes:.1f} minutes")
        seconds = time.perf_counter() - began
        if self.rank == 0:
            console.print(f"looked at {len(share)} pictures in {seconds:.1f} s: {len(share) / seconds:.1f} a second")
        return broken

    @contextmanager
    def _progress(self, total: int) -> Iterator:
        with Progress(console=console, disable=self.rank > 0, transient=True) as progress:
            task = progress.add_task("looking", total=total)
            yield lambda count: progress.advance(task, count)

    def _decode(self, path: Path, key: str, noun: str) -> Decoded | str:
        try:
            picture = load_image(path)
        except InputError as error:
            return str(error)
        small, thumbnail = io.BytesIO(), picture.convert("RGB")
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        thumbnail.save(small, "JPEG", quality=85)
        (self.thumbnails / f"{key}.jpg").write_bytes(small.getvalue())
        pixels = {name: encoder.prepare(picture) for name, encoder in self.encoders.items()}
        if self.segment is None:
            return Decoded(key, picture.size, pixels, noun, None, None)
        try:
            mask = load_image(mask_path(path)) if mask_path(path).exists() else None
        except InputError as error:
            return str(error)
        if mask is not None and mask.size != picture.size:
            return f"its mask is {mask.size}, it is {picture.size}"
        return Decoded(key, picture.size, pixels, noun, picture, mask)

    def _on_white(self, one: Decoded) -> Image.Image | None:
        """The object alone, where it stands; None where none is found: it has no masked scores."""
        if one.picture is None:
            return None
        try:
            cutout = find_object(one.picture, one.mask, self.segment, one.noun)
        except InputError:
            return None
        white = Image.new("RGB", cutout.size, WHITE)
        white.paste(cutout, mask=cutout.getchannel("A"))
        return white

    def _embed(self, decoded: Sequence[Decoded]) -> dict[str, str]:
        """Store the features of a batch; key -> reason of pictures that give no finite ones."""
        tensors, broken = {}, {}
        masked = [(one.key, white) for one in decoded if (white := self._on_white(one)) is not None]
        for name, encoder in self.encoders.items() if decoded else ():
            features = encoder.embed(torch.stack([one.pixels[name] for one in decoded]))
            for one, feature in zip(decoded, features, strict=True):
                tensors[f"{one.key}.{name}"] = feature
                if not feature.isfinite().all():
                    broken[one.key] = f"its {name} feature is not finite"
            for (key, _), feature in zip(
                masked, encoder.images([white for _, white in masked]) if masked else (), strict=True
            ):
                tensors[f"{key}.{name}_masked"] = feature
        tensors |= {f"{one.key}.size": torch.tensor(one.size) for one in decoded}
        tensors = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in broken}
        if tensors:
            final = self.store / f"{hashlib.sha256(' '.join(tensors).encode()).hexdigest()[:32]}.safetensors"
            partial = final.with_suffix(f".tmp{self.rank}")
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, partial)
            partial.replace(final)
        return broken

    def _read_store(self) -> dict[str, Looked]:
        found: dict[str, dict[str, Tensor]] = {}
        for path in sorted(self.store.glob("*.safetensors")):
            try:
                tensors = load_file(path)
            except (OSError, SafetensorError):
                path.unlink()  # torn by a crash of the machine: looked at again
                continue
            for name, tensor in tensors.items():
                key, _, what = name.partition(".")
                found.setdefault(key, {})[what] = tensor
        blank = Image.new("RGB", (8, 8))
        shapes = {name: encoder.images([blank])[0].shape for name, encoder in self.encoders.items()} if found else {}
        shapes |= {f"{name}_masked": shape for name, shape in shapes.items()} | {"size": torch.Size([2])}
        found = {
            key: features
            for key, features in found.items()
            if features.keys() >= {*self.encoders, "size"}  # the others are damaged: looked at again
            and all(shapes.get(name) == feature.shape for name, feature in features.items())
            and all(is_unit(feature) for name, feature in features.items() if name != "size")
        }
        sizes = {key: found[key].pop("size").tolist() for key in found}
        return {
            key: Looked(key, features, (sizes[key][0], sizes[key][1]))
            for key, features in found.items()
            if (self.thumbnails / f"{key}.jpg").exists()
        }

    def _gather(self, broken: dict[str, str]) -> dict[str, str]:
        """Wait for all processes, and tell each what the others could not read."""
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        each: list[dict[str, str]] = [{} for _ in range(self.world)]
        torch.distributed.all_gather_object(each, broken)
        return {key: reason for one in each for key, reason in one.items()}
