"""Write and read triplet shards (contract: `pig.data.schema`). Tar reading, URLs and braces are webdataset's."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import webdataset as wds
from PIL import Image

from pig.data.schema import METADATA, REFERENCE, TARGETS, Triplet
from pig.data.transforms import UNDECODABLE
from pig.errors import InputError
from pig.files import replacing, sha256_of, write_text

Raw = Mapping[str, Any]  # a sample as bytes: extension -> content, and "__key__"


class BadSampleError(Exception):
    """A sample that cannot be used; the message names it and why."""


class MissingSampleError(BadSampleError):
    """A sample that the shard's statistics promise and its tar does not give: a torn file, a dropped connection."""


@dataclass(frozen=True)
class ShardStats:
    """`train-000000_stats.json`. count: samples in the tar; bytes, sha256: of the tar; rejected: reason -> count;
    encoded: how, if it was (`pig.data.encoded`)."""

    count: int
    bytes: int
    sha256: str
    rejected: Mapping[str, int] = field(default_factory=dict)
    encoded: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError for values of other kinds: somebody else may have made the file."""
        if not isinstance(self.sha256, str) or not isinstance(self.rejected, Mapping):
            raise TypeError("sha256 is no text, or rejected holds no reasons")
        for value in (self.count, self.bytes, *self.rejected.values()):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise TypeError(f"a count is {str(value)[:80]!r}")
        if self.count * TAR_BLOCK > self.bytes:
            raise TypeError(f"{self.count} samples do not fit into {self.bytes} bytes")


def rejections(stats: Iterable[ShardStats]) -> Counter[str]:
    """How often samples were rejected for each reason, over several shards."""
    return sum((Counter(shard.rejected) for shard in stats), Counter[str]())


@dataclass(frozen=True)
class Shard:
    url: str
    stats: ShardStats


TAR_BLOCK = 512  # bytes: the least that a file takes in a tar
IN_COMMAND = re.compile(r"([^\s'\"/=]+)\.tar(?![\w.-])")  # the first one in a `pipe:` command


def _place(tar: str) -> tuple[str, str, str]:
    """A shard's path, URL or `pipe:` command as what stands before NAME.tar, NAME, and what stands behind.

    Raises:
        InputError: no NAME.tar stands in it.
    """
    if tar.startswith("pipe:"):
        if found := IN_COMMAND.search(tar):
            return tar[: found.start()], found[1], tar[found.end() :]
    else:
        path = urlsplit(tar).path if "://" in tar else tar
        name = path.rsplit("/", 1)[-1]
        if name.endswith(".tar") and name != ".tar":
            before, _, behind = tar.partition(path) if "://" in tar else ("", "", "")
            return before + path.removesuffix(name), name.removesuffix(".tar"), behind
    raise InputError(f"{tar}: a shard's name must end in .tar")


def stats_path(tar: str) -> str:
    """Where a shard's statistics lie: its own path, URL or command with `NAME.tar` made `NAME_stats.json`.

    Raises:
        InputError: no `NAME.tar` stands in it. (An address that is signed for one file opens no other: serve such
            shards by a command, `pipe:...`, or copy them.)
    """
    before, name, behind = _place(tar)
    return f"{before}{name}_stats.json{behind}"


def shard_name(tar: str) -> str:
    """`NAME.tar`, of a path, URL or `pipe:` command."""
    return f"{_place(tar)[1]}.tar"


# -- writing ----------------------------------------------------------------------------------------------------------


def triplet_members(triplet: Triplet, quality: int = 95) -> dict[str, Any]:
    """A triplet as webdataset's TarWriter takes it."""
    metadata = {**triplet.metadata, "caption": triplet.caption, "object": triplet.object}
    return {
        "__key__": triplet.key,
        "target.jpg": _encoded(triplet.target.convert("RGB"), "JPEG", quality=quality, subsampling=0),
        REFERENCE: _encoded(triplet.reference, "PNG"),
        METADATA: json.dumps(metadata, sort_keys=True).encode(),
    }


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_shard(tar: Path, triplets: Iterable[Triplet], rejected: Counter[str] | None = None) -> ShardStats:
    """Write triplets as a shard. The same triplets give the same bytes."""
    return write_samples(tar, (triplet_members(triplet) for triplet in triplets), rejected)


def write_samples(
    tar: Path,
    samples: Iterable[dict[str, Any]],
    rejected: Counter[str] | None = None,
    encoded: Mapping[str, Any] | None = None,
) -> ShardStats:
    """Write a shard aside, move it into place, and write its stats last.

    `rejected` is read after the last sample was taken, so that a generator may count as it goes.
    """
    tar.parent.mkdir(parents=True, exist_ok=True)
    Path(stats_path(str(tar))).unlink(missing_ok=True)
    count = 0
    with replacing(tar) as aside:
        with wds.TarWriter(str(aside), mtime=0, user="pig", group="pig") as writer:
            for sample in samples:
                writer.write(sample)
                count += 1
        reasons = dict(sorted((rejected or {}).items()))
        stats = ShardStats(count, aside.stat().st_size, sha256_of(aside), reasons, encoded)
    written = {name: value for name, value in asdict(stats).items() if value is not None}
    write_text(Path(stats_path(str(tar))), json.dumps(written, indent=1))
    return stats


# -- finding ----------------------------------------------------------------------------------------------------------


def find_shards(spec: str | Sequence[str]) -> tuple[list[Shard], list[str]]:
    """The shards that a spec names, and for each that was left out a line saying why.

    Args:
        spec: a folder, glob, brace pattern (`train-{000000..000199}.tar`) or URL (whatever webdataset opens), or
            several of them.

    Raises:
        InputError: nothing matches, or nothing of what matches is usable.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    shards, left_out = [], []
    for url in [url for one in specs for url in _expand(one)]:
        try:
            stats_of = stats_path(url)
        except InputError as error:
            left_out.append(str(error))
            continue
        try:
            with wds.gopen(stats_of) as stream:
                stats = ShardStats(**json.loads(stream.read()))
        except (OSError, ValueError, TypeError) as error:
            left_out.append(f"{url}: no readable {Path(stats_of).name} beside it, so it is unfinished ({error})")
            continue
        if stats.count:  # of a torn one, what is missing is counted when it is read
            shards.append(Shard(url, stats))
    if not shards:
        reasons = "".join(f"\n  {line}" for line in left_out[:5])
        raise InputError(
            f"no shard matches {specs}; make shards first, or correct data.shards (data.val_shards){reasons}"
        )
    return shards, left_out


def _expand(spec: str) -> list[str]:
    urls = []
    for url in wds.shardlists.expand_urls(spec):
        if "://" in url or url.startswith("pipe:"):
            urls.append(url)
        elif Path(url).is_dir():
            urls += sorted(str(path) for path in Path(url).glob("*.tar"))
        else:
            urls += sorted(glob(url))
    return urls


# -- reading ----------------------------------------------------------------------------------------------------------


class Counted:
    """A stream that counts and hashes what is read of it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.sha256, self.bytes = stream, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        content = self.stream.read(size)
        self.sha256.update(content)
        self.bytes += len(content)
        return content

    def close(self) -> None:
        self.stream.close()

    def check(self, shard: Shard) -> None:
        """
        Raises:
            MissingSampleError: what came is not what the shard's statistics are of.
        """
        while self.read(2**20):
            pass
        if self.sha256.hexdigest() != shard.stats.sha256:
            raise MissingSampleError(
                f"{shard.url} is torn, or changed: {self.bytes} bytes came, {shard.stats.bytes} were promised"
            )


def read_shard(shard: Shard, whole: bool = False) -> Iterator[Raw | BadSampleError]:
    """Exactly `shard.stats.count` samples in their order; what a torn tar lacks comes as MissingSampleError.

    whole: hold what was read against the statistics in the end.

    Raises:
        MissingSampleError: with `whole`, they differ. (A tar that is cut between two of its members looks whole.)
    """
    seen = 0
    counted: Counted | None = None
    try:
        counted = Counted(wds.gopen(shard.url))
        stream = wds.tariterators.tar_file_expander([{"url": shard.url, "stream": counted}])
        for sample in wds.tariterators.group_by_keys(stream):
            if seen == shard.stats.count:
                break
            yield sample
            seen += 1
        cause = "it ends too early"
    except (OSError, EOFError, ValueError) as error:
        cause = str(error)
    except Exception as error:  # tarfile and webdataset raise bare errors for torn archives
        cause = f"{type(error).__name__}: {error}"
    for index in range(seen, shard.stats.count):
        yield MissingSampleError(f"{shard.url}, sample {index}: the tar is torn ({cause})")
    if whole and counted is not None:
        counted.check(shard)


def decode_triplet(raw: Raw) -> Triplet:
    """Decode a sample; raises BadSampleError that names the sample and what is wrong with it."""
    target = next((extension for extension in TARGETS if extension in raw), None)
    if target is None:
        raise BadSampleError(f"{sample_name(raw)}: lacks member {TARGETS[0]} (or png, webp)")
    metadata = decode_metadata(raw)
    return Triplet(
        key=str(raw["__key__"]),
        target=decode_picture(raw, target, "RGB"),
        reference=decode_picture(raw, REFERENCE, "RGBA"),
        caption=metadata.pop("caption"),
        object=metadata.pop("object"),
        metadata=metadata,
    )


def sample_name(raw: Raw) -> str:
    return f"{raw.get('__url__', '')}, sample {raw.get('__key__', '?')}"


def decode_metadata(raw: Raw) -> dict[str, Any]:
    """The sample's JSON, with `caption` and `object` at least."""
    name = sample_name(raw)
    if METADATA not in raw:
        raise BadSampleError(f"{name}: lacks member {METADATA}")
    try:
        metadata = json.loads(raw[METADATA])
    except ValueError as error:
        raise BadSampleError(f"{name}: {METADATA} is not JSON ({error})") from error
    for entry in ("caption", "object"):
        if not isinstance(metadata, dict) or not (isinstance(metadata.get(entry), str) and metadata[entry].strip()):
            raise BadSampleError(f"{name}: {METADATA} has no {entry}")
    scores = metadata.get("scores", {})
    if not isinstance(scores, dict) or not all(isinstance(score, int | float) for score in scores.values()):
        raise BadSampleError(f"{name}: the scores in {METADATA} are no numbers with names")
    return metadata


def decode_picture(raw: Raw, member: str, mode: str) -> Image.Image:
    name = sample_name(raw)
    if member not in raw:
        raise BadSampleError(f"{name}: lacks member {member}")
    try:
        return Image.open(io.BytesIO(raw[member])).convert(mode)
    except UNDECODABLE as error:
        raise BadSampleError(f"{name}: {member} does not decode ({error})") from error
