"""`generate`: benchmarks that are resumed and split, segmenters by name, and what users get wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import embedded, generate
from PIL import Image

from pig import cli
from pig.commands.generate import parse_shard
from pig.data.images import read_manifest
from pig.data.subjects import read_subjects
from pig.data.transforms import MAX_PIXELS
from pig.errors import InputError
from pig.methods import load_pipeline
from pig.models.foreground import make_segmenter
from pig.toyworld import scene

QUICK = {"images_per_prompt": 2, "steps": 2, "batch_size": 4, "image_guidance": 2.0, "text_guidance": 1.5}


@pytest.fixture(scope="module")
def few(toy_data, tmp_path_factory) -> Path:
    """Three subjects with four, two and one picture, and two prompts: 12 images at two each."""
    folder = tmp_path_factory.mktemp("few")
    for name, pictures in (("mug_006", 4), ("boat_000", 2), ("cat_003", 1)):
        (folder / name).mkdir()
        for path in sorted((toy_data / "subjects" / name).glob("*"))[: 2 * pictures]:
            shutil.copy(path, folder / name)
    prompts = ["a photo of a {0} {1}, on a beach", "a photo of a {0} {1}, in space"]
    lines = ",\n".join(f"'{one}'.format(unique_token, class_token)" for one in prompts)
    listed = "\n".join(f"{name},{name.split('_')[0]}" for name in ("mug_006", "boat_000", "cat_003"))
    (folder / "prompts_and_classes.txt").write_text(
        f"Classes\n\nsubject_name,class\n{listed}\n\nPrompts\n\n"
        f"Object Prompts\n\nprompt_list = [\n{lines}\n]\n\nLive Subject Prompts\n\nprompt_list = [\n{lines}\n]\n"
    )
    return folder


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    generate(out, subjects=few, **QUICK)
    return out


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path)).astype(int) for path in folder.glob("*/*/*.png")
    }


def test_a_whole_benchmark(few, whole) -> None:
    found = pictures(whole)
    assert len(found) == 12
    assert set(found) == {
        f"{subject}/{prompt}/{seed}.png"
        for subject in ("mug_006", "boat_000", "cat_003")
        for prompt in (0, 1)
        for seed in (0, 1)
    }
    lines = read_manifest(whole)
    assert set(lines) == set(found)
    line = lines["cat_003/1/0.png"]
    assert (line["prompt"], line["class_noun"], line["seed"]) == ("a photo of a cat, in space", "cat", 0)
    assert line["settings"]["image_guidance"] == 2.0
    assert [len(lines[f"{name}/0/0.png"]["settings"]["references"]) for name in ("mug_006", "boat_000")] == [4, 2]


@pytest.mark.slow
def test_split_over_machines_batches_and_calls_the_same_images(few, whole, tmp_path) -> None:
    for part in range(3):
        generate(tmp_path, subjects=few, shard=f"{part}/3", **{**QUICK, "batch_size": 3})
    expected, found = pictures(whole), pictures(tmp_path)
    assert set(found) == set(expected)
    for file, picture in found.items():
        assert np.abs(picture - expected[file]).max() <= 1, file
    assert len(list(tmp_path.glob("manifest-*-of-3.jsonl"))) == 3
    assert set(read_manifest(tmp_path)) == set(expected)
    one = tmp_path / "one"
    cat = sorted((few / "cat_003").glob("0?.png"))
    generate(one, references=cat, prompt=["a photo of a cat, in space"], seed=1, **{**QUICK, "images_per_prompt": 1})
    difference = np.abs(pictures(one)["references/0/1.png"] - expected["cat_003/1/1.png"])
    assert difference.max() <= 1


def test_what_is_finished_is_kept_and_what_is_torn_is_drawn_again(few, whole, tmp_path, capsys) -> None:
    out = tmp_path / "again"
    shutil.copytree(whole, out)
    torn, gone, kept = out / "mug_006/0/1.png", out / "boat_000/1/0.png", out / "cat_003/0/0.png"
    torn.write_bytes(torn.read_bytes()[:200])
    gone.unlink()
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:30]]) + "\n")  # killed while writing
    before = kept.stat().st_mtime_ns
    generate(out, subjects=few, **QUICK)
    assert "9 of 12 images are finished" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == before
    expected, found = pictures(whole), pictures(out)
    assert all(np.abs(found[file] - expected[file]).max() <= 1 for file in expected)
    files = [json.loads(line)["file"] for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert sorted(files) == sorted(expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_guidance": 3.0}, "image_guidance=2.0, now 3.0"),
        ({"scheduler": "ddim"}, "scheduler='UniPCMultistepScheduler', now 'DDIMScheduler'"),
        ({"references_per_subject": 1}, "references="),
    ],
)
def test_other_settings_are_not_mixed_into_a_folder(few, whole, change, named) -> None:
    with pytest.raises(InputError, match="drawn otherwise") as error:
        generate(whole, subjects=few, **{**QUICK, **change})
    assert named in str(error.value)


def test_a_shard_asks_only_for_what_it_draws_and_names_all_that_is_wrong(few, tmp_path) -> None:
    broken = tmp_path / "subjects"
    shutil.copytree(few, broken)
    for path in ("cat_003/00.png", "boat_000/01.png"):
        (broken / path).write_bytes(b"no picture")
    generate(tmp_path / "out", subjects=broken, shard="0/6", **{**QUICK, "steps": 1})
    assert {file.split("/")[0] for file in read_manifest(tmp_path / "out")} == {"mug_006"}
    with pytest.raises(InputError, match=r"(?s)boat_000/01.png.*cat_003/00.png"):
        generate(tmp_path / "all", subjects=broken, **QUICK)


def test_another_model_is_not_mixed_into_a_folder(few, tmp_path) -> None:
    model, cat = tmp_path / "model", sorted((few / "cat_003").glob("0?.png"))
    embedded().save_pretrained(model)
    given = {"model": str(model), "references": cat, "prompt": ["a cat"], "steps": 1}
    generate(tmp_path / "out", images_per_prompt=1, **given)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(
        json.dumps({**index, "settings": {**index["settings"], "reference_caption": "object"}})
    )
    with pytest.raises(InputError, match="drawn otherwise.*reference_caption='caption'"):
        generate(tmp_path / "out", images_per_prompt=2, **given)


def test_switches_and_dashes(few, tmp_path, monkeypatch) -> None:
    cat = str(few / "cat_003/00.png")
    given = ["generate", "--references", cat, cat, "--prompt", "a cat", "--steps", "1", "--save-references"]
    monkeypatch.setattr(sys, "argv", ["pig.cli", *given, "--images-per-prompt=1", "--out", str(tmp_path / "out")])
    cli.main()
    assert len(list((tmp_path / "out/cutouts/references").iterdir())) == 2


@pytest.mark.slow
def test_another_prompts_file(few, tmp_path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text((few / "prompts_and_classes.txt").read_text().replace("in space", "at sunset"))
    generate(tmp_path / "out", subjects=few, prompts=prompts, **{**QUICK, "steps": 1, "images_per_prompt": 1})
    assert read_manifest(tmp_path / "out")["mug_006/1/0.png"]["prompt"] == "a photo of a mug, at sunset"


def test_references_are_cut_out_by_alpha_then_mask_then_segmenter_and_shown(tmp_path) -> None:
    drawing = scene.draw(scene.make_subject(scene.HELD_OUT_SEED, "mug"), "beach", 1, 64)
    photo, mask = Image.fromarray(drawing.image), Image.fromarray(drawing.mask)
    for name in ("plain", "masked", "alpha", "opaque"):
        photo.save(tmp_path / f"{name}.png")
    corner = Image.new("L", (64, 64))
    corner.paste(255, (0, 0, 8, 8))
    corner.save(tmp_path / "masked.mask.png")
    photo.putalpha(mask)
    photo.save(tmp_path / "alpha.png")
    corner.save(tmp_path / "alpha.mask.png")  # the picture's own alpha comes first
    photo.putalpha(255)
    photo.save(tmp_path / "opaque.png")  # an alpha that says nothing
    files = [tmp_path / f"{name}.png" for name in ("plain", "masked", "alpha", "opaque")]
    generate(
        tmp_path / "out",
        references=files,
        prompt=["a photo of a mug"],
        segmenter="sam",
        save_references=True,
        steps=1,
        images_per_prompt=1,
    )
    shown = {path.stem[3:]: Image.open(path) for path in (tmp_path / "out/cutouts/references").iterdir()}
    assert set(shown) == {"plain", "masked", "alpha", "opaque"}
    for name in ("plain", "alpha", "opaque"):  # SAM and the exact mask find the same object
        assert overlap(shown[name].getchannel("A"), drawing.mask > 127) > 0.85, name
    assert overlap(shown["masked"].getchannel("A"), np.asarray(corner) > 127) == 1


def overlap(found: Image.Image, wanted: np.ndarray) -> float:
    mask = np.asarray(found) > 127
    return float((mask & wanted).sum() / (mask | wanted).sum())


def test_sam_by_the_whole_picture_a_box_or_a_point() -> None:
    scores = []
    for number in range(8):
        seed = scene.HELD_OUT_SEED + 5000 + number
        drawing = scene.draw(scene.make_subject(seed), "beach", seed, 64)
        inside, picture = drawing.mask > 127, Image.fromarray(drawing.image)
        ys, xs = np.nonzero(inside)
        middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        for shown in (
            {},
            {"box": (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)},
            {"point": (xs[middle], ys[middle])},
        ):
            scores.append(overlap(make_segmenter("sam", **shown)(picture, ""), inside))
    assert np.mean(scores) > 0.85


def test_the_reference_cache_and_every_control_reach_the_pipeline(few, tmp_path) -> None:
    cat = sorted((few / "cat_003").glob("0?.png"))
    out = tmp_path / "out"
    settings = {
        "strength": 0.5,
        "negative_prompt": "a dog",
        "guidance_rescale": 0.2,
        "pooling": "mean",
        "reference_caption": "object",
        "reference_noise": "fixed",
        "guidance_interval": [0.1, 0.9],
        "reference_every": 2,
        "deep_every": 2,
        "height": 64,
        "width": 72,
    }
    generate(out, references=cat, prompt=["a photo of a cat"], steps=3, reference_cache=0.1, **settings)
    line = read_manifest(out)["references/0/0.png"]
    assert {name: line["settings"][name] for name in settings} == settings
    assert Image.open(out / "references/0/0.png").size == (72, 64)


def test_inpainting(few, tmp_path) -> None:
    picture = Image.fromarray(scene.draw(scene.make_subject(5), "beach", 5, 64).image)
    picture.save(tmp_path / "picture.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    white = Image.new("RGBA", (64, 64), "white")  # as paint programs save it: white, and transparent elsewhere
    white.putalpha(mask)
    white.save(tmp_path / "hole.png")
    cat = sorted((few / "cat_003").glob("0?.png"))
    given = {"image": tmp_path / "picture.png", "mask": tmp_path / "hole.png", "steps": 2}
    generate(tmp_path / "out", references=cat, prompt=["a cat, on a beach"], images_per_prompt=1, **given)
    drawn, before = np.asarray(Image.open(tmp_path / "out/references/0/0.png")), np.asarray(picture)
    assert np.array_equal(drawn[np.asarray(mask) == 0], before[np.asarray(mask) == 0])
    assert not np.array_equal(drawn, before)


@pytest.mark.parametrize("text", ["4/4", "²/3", "1", "a/b", "-1/2", "1/0"])
def test_shards_that_are_none(text) -> None:
    with pytest.raises(InputError, match="--shard must be I/N"):
        parse_shard(text)


def test_bad_input_has_its_own_message_and_code_2(few, tmp_path, monkeypatch, capsys) -> None:
    picture, torn, huge = tmp_path / "a.png", tmp_path / "torn.jpg", tmp_path / "huge.png"
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noisy.save(picture)
    noisy.save(torn)
    torn.write_bytes(torn.read_bytes()[:900])
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(huge)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    empty = tmp_path / "empty.png"
    noisy.save(empty)
    Image.new("L", (64, 64)).save(tmp_path / "empty.mask.png")
    plain = tmp_path / "plain.png"
    Image.new("RGB", (64, 64), (90, 140, 200)).save(plain)
    black, small = tmp_path / "black.png", tmp_path / "small.png"
    Image.new("L", (64, 64)).save(black)
    Image.new("L", (32, 32), 255).save(small)
    pickled = tmp_path / "pickled"
    embedded().save_pretrained(pickled)
    torch.save({}, pickled / "base_unet/diffusion_pytorch_model.bin")
    no_tokens, no_limit = tmp_path / "no_tokens", tmp_path / "no_limit"
    for folder, file in ((no_tokens, "tokenizer.json"), (no_limit, "tokenizer_config.json")):
        embedded().save_pretrained(folder)
        (folder / "tokenizer" / file).unlink()
    strip, unnamed = tmp_path / "strip.png", tmp_path / "sam.pth"
    unnamed.touch()
    noisy.resize((300, 2)).save(strip)
    one = ["--references", str(picture), "--prompt", "a mug"]
    for arguments, message in [
        ([], "give --references and --prompt (or --prompts, a file); or --subjects"),
        (["--references", str(tmp_path / "none.png"), "--prompt", "a"], "cannot read image"),
        (["--references", str(torn), "--prompt", "a"], "cannot read image"),
        (["--references", str(huge), "--prompt", "a"], "more than 80 megapixels"),
        (["--references", str(bomb), "--prompt", "a"], "bomb.png"),
        (["--references", str(empty), "--prompt", "a"], "is empty: no object is left"),
        (["--references", str(plain), "--prompt", "a", "--segmenter", "sam"], "sam finds no object: show it where"),
        ([*one, "--segmenter", "sam", "--box", "1", "2", "3"], "a box is 4 numbers"),
        ([*one, "--segmenter", "sam", "--box", "1", "2", "300", "4"], "lies outside of the picture (64x64)"),
        ([*one, "--segmenter", "sam", "--sam", str(tmp_path / "no.pth")], "there is no SAM"),
        ([*one, "--segmenter", "sam", "--sam", str(unnamed)], "the name of a SAM file must say"),
        ([*one, "--segmenter", "u2"], "segmenter"),
        ([*one, "--segmenter", "sam", "--box", "30", "30", "9", "9"], "x0 < x1"),
        (["--references", str(strip), "--prompt", "a", "--segmenter", "sam"], "in a strip of 300x2"),
        ([*one, "--steps", "2000", "--scheduler", "ddim"], "num_inference_steps must be between 1 and 1000"),
        ([*one, "--reference_cache", "-1"], "reference_cache must be between"),
        ([*one, "--out", str(picture / "below")], "is a file, not a folder"),
        ([*one, "--model", str(no_tokens)], "a file is missing in tokenizer/"),
        ([*one, "--model", str(no_limit)], "a file is missing in tokenizer/"),
        ([*one, "--point", "1", "2"], "is for the segmenter `sam`"),
        ([*one, "--scheduler", "euler"], "euler"),
        ([*one, "--text_guidance", "-2"], "text_guidance must be between 0 and 1000"),
        ([*one, "--strength", "2"], "strength must be between 0 and 1"),
        ([*one, "--guidance_interval", "0.5"], "two shares of the steps"),
        ([*one, "--image", str(picture)], "both --image and --mask"),
        ([*one, "--image", str(picture), "--mask", str(black)], "black all over"),
        ([*one, "--image", str(picture), "--mask", str(small)], "mask is (32, 32)"),
        ([*one, "--shard", "0/2"], "--shard is for --subjects"),
        ([*one, "--subjects", str(few)], "has references and prompts of its own"),
        (["--subjects", str(tmp_path / "none")], "there is no subjects folder"),
        (["--subjects", str(few), "--prompts", str(tmp_path / "none.txt")], "cannot read"),
        (["--subjects", str(few), "--references_per_subject", "0"], "must be at least 1"),
        ([*one, "--images_per_prompt", "0"], "must be at least 1"),
        ([*one, "--model", str(tmp_path)], "is no model: give"),
        ([*one, "--model", str(pickled)], "diffusion_pytorch_model.bin, a pickle"),
    ]:
        monkeypatch.setattr(sys, "argv", ["pig.cli", "generate", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        error = capsys.readouterr().err
        assert end.value.code == 2, arguments
        assert message in error, (arguments, error)
        assert not list((tmp_path / "out").rglob("*.png"))


def test_an_exported_model_of_another_kind_is_refused(tmp_path) -> None:
    shutil.copytree("pig/toyworld/weights/base", tmp_path / "sd")
    with pytest.raises(InputError, match="Stable Diffusion without a method"):
        load_pipeline(tmp_path / "sd")


def test_subjects_of_the_contract_are_read(few) -> None:
    assert [(s.name, len(s.images), len(s.prompts)) for s in read_subjects(few)] == [
        ("mug_006", 4, 2),
        ("boat_000", 2, 2),
        ("cat_003", 1, 2),
    ]
