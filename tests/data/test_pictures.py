"""Pictures in and out: modes, cutting out, augmentation, photographs, subjects."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_gen.photos import pack_photos
from pig.data.images import Job, read_generated, save_generated
from pig.data.shards import decode_triplet, find_shards, read_shard
from pig.data.subjects import read_subjects
from pig.data.transforms import ReferenceAugmentation, cut_out, load_image, place, reference_picture
from pig.errors import InputError


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "I;16", "1"])
def test_any_mode_is_read(tmp_path, mode) -> None:
    image = Image.fromarray(np.full((6, 10), 257 * 200, np.uint16)) if mode == "I;16" else Image.new("L", (10, 6), 200)
    if mode != "I;16":
        image = image.convert("RGBA").convert(mode) if mode in ("LA", "RGBA") else image.convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "LA") else "a.png")
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    assert loaded.size == (10, 6)
    assert abs(loaded.convert("RGB").getpixel((3, 3))[0] - (255 if mode == "1" else 200)) <= 1


def test_exif_rotation_is_applied(tmp_path) -> None:
    image = Image.new("RGB", (10, 6))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (6, 10)


def test_unreadable_pictures_are_named(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    for name in ("a.png", "none.png"):
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match="one size"):
        cut_out(Image.new("RGB", (4, 4)), Image.new("L", (5, 4), 255))
    with pytest.raises(InputError, match="empty"):
        cut_out(Image.new("RGB", (4, 4)), Image.new("L", (4, 4)))


def object_box(picture: Image.Image) -> tuple[int, int, int, int]:
    box = Image.fromarray((np.asarray(picture).min(2) < 250).astype(np.uint8) * 255).getbbox()
    assert box is not None
    return box


def test_reference_on_white_is_cropped_and_padded() -> None:
    cutout = Image.new("RGBA", (100, 60), (255, 0, 0, 0))
    cutout.paste((0, 0, 255, 255), (20, 10, 60, 30))  # 40 x 20
    left, top, right, bottom = object_box(reference_picture(cutout, 64))
    assert (right - left, bottom - top) == (64, 32)
    assert (left, top) == (0, 16)
    colours = reference_picture(cutout, 64).getcolors()
    assert colours is not None
    assert all(not (r > g and r > b) for _, (r, g, b) in colours)  # the hidden red does not bleed in
    assert object_box(place(cutout.crop((20, 10, 60, 30)), 64, 0.5, x=1, y=0)) == (32, 0, 64, 16)


def test_augmentation_ranges() -> None:
    cutout = Image.new("RGBA", (30, 20), (0, 0, 0, 255))
    augment = ReferenceAugmentation(scale=(0.4, 0.8), flip=0.0)
    boxes = [object_box(augment(cutout, None, 64, np.random.default_rng(i))) for i in range(200)]
    widths = [right - left for left, _, right, _ in boxes]
    assert 25 <= min(widths) < 30
    assert 46 < max(widths) <= 52
    assert len({box[:2] for box in boxes}) > 50
    same = [augment(cutout, None, 64, np.random.default_rng(7)).tobytes() for _ in range(2)]
    assert same[0] == same[1]


def test_augmentation_options_of_the_release() -> None:
    cutout = Image.new("RGBA", (30, 30), (200, 40, 40, 255))
    cutout.paste((40, 40, 200, 255), (0, 0, 15, 30))

    def share_changed(**options: float) -> float:
        plain, other = ReferenceAugmentation((1, 1), 0.0), ReferenceAugmentation((1, 1), **{"flip": 0.0, **options})
        pairs = [
            (plain(cutout, None, 32, np.random.default_rng(i)), other(cutout, None, 32, np.random.default_rng(i)))
            for i in range(200)
        ]
        return float(np.mean([a.tobytes() != b.tobytes() for a, b in pairs]))

    assert share_changed() == 0
    for name in ("flip", "jitter", "erasing"):
        assert 0.3 < share_changed(**{name: 0.5}) < 0.7
    with pytest.raises(InputError, match="scale"):
        ReferenceAugmentation(scale=(0.8, 0.4))
    with pytest.raises(InputError, match="erasing"):
        ReferenceAugmentation(erasing=1.5)


def test_heavy_augmentation_on_any_background() -> None:
    """InstantBooth's: turned, cut, on black, or with what is around the object."""
    target = Image.new("RGB", (60, 60), (10, 120, 10))
    target.paste((200, 40, 40), (20, 10, 40, 50))
    cutout = target.convert("RGBA")
    alpha = Image.new("L", target.size)
    alpha.paste(255, (20, 10, 40, 50))
    cutout.putalpha(alpha)

    def made(seed: int = 0, **options: Any) -> np.ndarray:
        augment = ReferenceAugmentation(**{"scale": (1, 1), "flip": 0.0, **options})
        return np.asarray(augment(cutout, target, 64, np.random.default_rng(seed)))

    white, black = made(), made(background="black")
    assert {tuple(one) for one in white.reshape(-1, 3)} == {(255, 255, 255), (200, 40, 40)}
    assert {tuple(one) for one in black.reshape(-1, 3)} == {(0, 0, 0), (200, 40, 40)}
    assert np.array_equal((white == 255).all(-1), (black == 0).all(-1))
    alpha.paste(255, (10, 10, 40, 50))  # a wider object, of which the mask takes in some green
    cutout.putalpha(alpha)
    assert (made(background="own") == (10, 120, 10)).all(-1).any()
    alpha.paste(0, (0, 0, 60, 60))
    alpha.paste(255, (20, 10, 40, 50))
    cutout.putalpha(alpha)
    areas = [(made(seed, rotation=40.0, background="black") != 0).any(-1).mean() for seed in range(20)]
    assert np.std(areas) > 0.02  # it fills the frame, whichever way it is turned
    shapes = {(made(seed, crop=0.4, background="black") != 0).any(-1).any(0).sum() for seed in range(20)}
    assert len(shapes) > 5
    for wrong in ({"rotation": 200.0}, {"crop": 0.6}, {"background": "green"}):
        with pytest.raises(InputError, match=f"augmentation.{next(iter(wrong))}"):
            made(**wrong)
    with pytest.raises(InputError, match="encoded shards"):
        ReferenceAugmentation(background="own")(cutout, None, 64, np.random.default_rng(0))


def test_photographs_of_any_kind_become_shards(tmp_path) -> None:
    photos = tmp_path / "photos"
    (photos / "dog").mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8))
    mask = Image.new("L", noise.size)
    mask.paste(255, (30, 20, 90, 70))
    exif = noise.getexif()
    exif[0x0112] = 6
    for name, image in {"rgb": noise, "grey": noise.convert("L"), "cmyk": noise.convert("CMYK")}.items():
        image.save(photos / "dog" / f"{name}.jpg")
        mask.save(photos / "dog" / f"{name}.mask.png")
    noise.save(photos / "dog/turned.jpg", exif=exif)
    mask.transpose(Image.Transpose.ROTATE_270).save(photos / "dog/turned.mask.png")
    (photos / "dog/rgb.txt").write_text("a photo of a dog, in noise")
    alpha = noise.copy()
    alpha.putalpha(mask)
    alpha.save(photos / "dog/alpha.png")
    noise.save(photos / "dog/unmasked.jpg")
    (photos / "dog/broken.jpg").write_bytes(b"no")
    pack_photos(photos, tmp_path / "shards", "dog", size=64)
    (shard,), _ = find_shards(str(tmp_path / "shards"))
    assert shard.stats.count == 5
    assert shard.stats.rejected == {"no mask": 1, "unreadable": 1}
    found = [decode_triplet(raw) for raw in read_shard(shard)]  # type: ignore[arg-type]
    triplets = {triplet.metadata["source"]: triplet for triplet in found}
    assert triplets["dog/rgb.jpg"].caption == "a photo of a dog, in noise"
    assert triplets["dog/cmyk.jpg"].caption == "a photo of a dog"
    assert triplets["dog/turned.jpg"].target.size == (64, 85)
    for triplet in triplets.values():
        assert triplet.reference.size == triplet.target.size
        assert 0.15 < np.asarray(triplet.reference)[..., 3].mean() / 255 < 0.4
    with pytest.raises(InputError, match="no photographs"):
        pack_photos(tmp_path / "none", tmp_path / "out", "dog")


def test_the_same_triplets_give_the_same_bytes(toy_data, tmp_path) -> None:
    command = [sys.executable, "-m", "data_gen", "triplets", "--out", str(tmp_path), "--count", "24"]
    subprocess.run(command, check=True, capture_output=True)
    (again,), _ = find_shards(str(tmp_path))
    assert again.stats.sha256 == find_shards(str(toy_data / "triplets"))[0][0].stats.sha256


def test_subjects_in_dreambooths_layout(toy_data, tmp_path) -> None:
    subjects = read_subjects(toy_data / "subjects")
    assert len(subjects) == 12
    assert subjects[6].name == "mug_006"
    assert subjects[6].prompts[0] == "a photo of a mug, on a beach"
    assert [s.class_noun for s in subjects if s.live] == ["cat", "fish"]
    assert all(r.mode == "RGBA" and r.getchannel("A").getextrema()[0] == 0 for r in subjects[0].references(2))
    (tmp_path / "prompts_and_classes.txt").write_text("Classes\n\nsubject_name,class\ndog6,dog\n\nPrompts\n")
    with pytest.raises(InputError, match="'dog6'.*has no pictures"):
        read_subjects(tmp_path)
    with pytest.raises(InputError, match="no subjects folder"):
        read_subjects(tmp_path / "none")


def test_generated_images_come_back(toy_data, tmp_path) -> None:
    subjects = read_subjects(toy_data / "subjects")
    jobs = [Job(subjects[0], 2, 7), Job(subjects[0], 2, 8), Job(subjects[3], 0, 7)]
    for job in jobs:
        save_generated(tmp_path, job, Image.new("RGB", (8, 8)), method="m", settings={"steps": 1})
    found = [(one.subject, one.prompt_index, one.seed) for one in read_generated(tmp_path, subjects)]
    assert found == [(job.subject, job.prompt_index, str(job.seed)) for job in jobs]
    lines = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert lines[0]["file"] == "boat_000/2/7.png"
    save_generated(tmp_path, jobs[0], Image.new("RGB", (8, 8)), method="again", settings={})
    files = [json.loads(line)["file"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(files) == len(set(files)) == 3
    assert lines[2]["prompt"] == "a photo of a cat, on a beach"
    with pytest.raises(InputError, match="no generated images"):
        read_generated(tmp_path / "none", subjects)
    (tmp_path / "boat_000/99").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "boat_000/99/0.png")
    with pytest.raises(InputError, match="'99' is no prompt index"):
        read_generated(tmp_path, subjects)
