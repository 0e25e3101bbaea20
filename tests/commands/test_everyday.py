"""What one does with photographs of one's own: draw, score, pack for training; one subject of a benchmark."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_gen.__main__ import run as data_gen
from pig import cli
from pig.data.images import read_manifest
from pig.data.shards import decode_triplet, find_shards, read_shard
from pig.errors import InputError
from tests.conftest import generate


@pytest.fixture(scope="module")
def drawn(toy_data, tmp_path_factory):
    """Pictures of one subject, drawn from two photographs without masks."""
    folder = tmp_path_factory.mktemp("mine")
    for number in (0, 1):
        shutil.copy(toy_data / f"subjects/boat_000/0{number}.png", folder / f"{number}.jpg.png")
    (folder / "prompts.txt").write_text(
        "a photo of a boat, in space\n\na photo of a {1}, on a beach\n", encoding="utf-8"
    )
    files = [folder / "0.jpg.png", folder / "1.jpg.png"]
    told = {"prompts": folder / "prompts.txt", "class_noun": "boat", "steps": 1, "images_per_prompt": 1}
    generate(folder / "out", references=files, segmenter="sam", save_references=True, **told)
    return folder


def test_prompts_of_a_text_file(drawn) -> None:
    prompts = {file: line["prompt"] for file, line in read_manifest(drawn / "out").items()}
    assert prompts == {
        "references/0/0.png": "a photo of a boat, in space",
        "references/1/0.png": "a photo of a boat, on a beach",
    }


def test_what_was_cut_out_is_packed_for_training(drawn, tmp_path) -> None:
    """As the segmenter itself does it."""
    data_gen(["photos", f"--photos={drawn / 'out/cutouts'}", f"--out={tmp_path / 'a'}", "--object=boat", "--size=64"])
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for file in drawn.glob("*.jpg.png"):
        shutil.copy(file, photographs)
    words = [f"--photos={photographs}", f"--out={tmp_path / 'b'}", "--object=boat", "--size=64"]
    with pytest.raises(InputError, match="none of 2 photographs"):
        data_gen(["photos", *words[:1], f"--out={tmp_path / 'c'}", *words[2:]])
    data_gen(["photos", *words, "--segmenter=sam"])
    packed = []
    for name in ("a", "b"):
        (shard,) = find_shards(str(tmp_path / name))[0]
        packed.append([decode_triplet(row) for row in read_shard(shard)])
    assert len(packed[0]) == len(packed[1]) == 2
    for one, other in zip(*packed, strict=True):
        assert np.array_equal(np.asarray(one.reference)[..., 3], np.asarray(other.reference)[..., 3])
        assert (np.asarray(one.reference)[..., 3] > 127).mean() > 0.03


def test_pictures_of_ones_own_are_scored(drawn, tmp_path) -> None:
    words = ["evaluate", f"--images={drawn / 'out'}", f"--out={tmp_path}"]
    references = ["--references", str(drawn / "0.jpg.png"), str(drawn / "1.jpg.png")]
    cli.run([*words, *references])
    found = json.loads((tmp_path / "results.json").read_text())
    assert [one["prompt"] for one in found["images"]] == [
        "a photo of a boat, in space",
        "a photo of a boat, on a beach",
    ]
    for wrong, message in (
        ([], "give --subjects, a benchmark's folder, or --references"),
        ([*references, "--only", "boat_000"], "--prompts and --only are for --subjects"),
        (["--references", str(drawn / "none.png")], "none.png"),
    ):
        with pytest.raises(InputError, match=message):
            cli.run([*words, *wrong])
    with pytest.raises(InputError, match=r"has no manifest\.jsonl that tells its prompts"):
        cli.run(["evaluate", f"--images={drawn}", f"--out={tmp_path / 'x'}", *references])


def test_some_subjects_of_a_benchmark(toy_data, tmp_path) -> None:
    words = {"steps": 1, "images_per_prompt": 1, "prompts": tmp_path / "prompts.txt"}
    words["prompts"].write_text("a photo of a {1}, in space")
    generate(tmp_path / "out", subjects=toy_data / "subjects", only=["boat_000"], **words)
    assert [path.name for path in sorted((tmp_path / "out").iterdir()) if path.is_dir()] == ["boat_000"]
    with pytest.raises(InputError, match=r"--only dog: .* names no such subject; it has boat_000"):
        generate(tmp_path / "other", subjects=toy_data / "subjects", only=["dog"], **words)
    for other in ("boot_001", "boat_000"):  # of another subject of the benchmark: it does not count
        target = tmp_path / "out" / other / "0"
        if not target.exists():
            shutil.copytree(tmp_path / "out/boat_000/0", target)
    scored = [f"--subjects={toy_data / 'subjects'}", f"--prompts={words['prompts']}", "--only", "boat_000"]
    cli.run(["evaluate", f"--images={tmp_path / 'out'}", f"--out={tmp_path / 'scores'}", *scored])
    assert list(json.loads((tmp_path / "scores/results.json").read_text())["subjects"]) == ["boat_000"]


@pytest.mark.parametrize("template", ["a {1.__class__}", "{1:>200000000}", "a {2}", "a {", "{{1}}"])
def test_templates_are_filled_and_not_evaluated(toy_data, tmp_path, template) -> None:
    (tmp_path / "prompts.txt").write_text(template)
    with pytest.raises(InputError, match="may hold"):
        generate(tmp_path / "out", subjects=toy_data / "subjects", prompts=tmp_path / "prompts.txt")


def test_a_prompt_may_hold_braces(drawn, tmp_path) -> None:
    generate(
        tmp_path, references=[drawn / "0.jpg.png"], prompt=["a boat {1.__class__} {0}"], steps=1, images_per_prompt=1
    )
    assert read_manifest(tmp_path)["references/0/0.png"]["prompt"] == "a boat {1.__class__}"


def test_a_byte_order_mark_and_any_locale(toy_data, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa photo of a {1}, in the snow – überall".encode())
    told = {"steps": 1, "images_per_prompt": 1, "only": ["boat_000"]}
    generate(tmp_path / "out", subjects=toy_data / "subjects", prompts=tmp_path / "prompts.txt", **told)
    assert read_manifest(tmp_path / "out")["boat_000/0/0.png"]["prompt"] == "a photo of a boat, in the snow – überall"


def test_a_picture_of_one_pixel_row(tmp_path) -> None:
    Image.new("RGB", (100_000, 1), "red").save(tmp_path / "strip.png")
    generate(tmp_path / "out", references=[tmp_path / "strip.png"], prompt=["a mug"], steps=1, images_per_prompt=1)
    assert (tmp_path / "out/references/0/0.png").exists()
