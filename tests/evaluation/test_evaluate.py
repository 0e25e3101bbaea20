"""The command evaluate: what it writes, what it refuses."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from benches import evaluate, refused
from PIL import Image
from small_networks import noise

from pig.data.subjects import load_cutout, read_subjects
from pig.data.transforms import load_image
from pig.evaluation.benchmark import Scorer
from pig.evaluation.embeddings import Embedder
from pig.models.encoders import load_clip, load_dino
from pig.models.foreground import make_segmenter


def test_evaluate_writes_what_outside_checks_read(bench, capsys) -> None:
    found = evaluate(bench, "--clip=toyworld", "--dino=toyworld", "--protocol=dreambooth")
    assert found["protocol"] == "dreambooth"
    assert len(found["hash"]) == 16
    for name in ("clip_t", "clip_i", "dino"):
        score = found["scores"][name]
        assert -1 <= score["low"] <= score["mean"] <= score["high"] <= 1
        means = [of[name] for of in found["subjects"].values()]
        assert score["mean"] == pytest.approx(sum(means) / 3)
    assert set(found["subjects"]) == {"can", "dog2", "robot_toy"}
    told = capsys.readouterr().out
    assert "mean nothing outside of it" in told
    assert "looked at 24 pictures" in told
    out = bench / "out"
    text = (out / "table.md").read_text()
    assert "| BootPIG | .674 | .797 | .311 | not stated |" in text
    assert "| can |" in text
    assert r"BootPIG$^\dagger$ & .674 & .797 & .311 \\" in (out / "table.tex").read_text()
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert {row["sort"] for row in rows} == {"all", "bound", "group", "subject"}
    (row,) = [row for row in rows if row["sort"] == "all" and row["score"] == "dino"]
    assert float(row["mean"]) == found["scores"]["dino"]["mean"]
    assert len(list(csv.DictReader((out / "images.csv").open()))) == 18
    # Nothing is looked at twice; what is lost is looked at again.
    again = evaluate(bench)
    assert again == found
    assert "looked at" not in capsys.readouterr().out
    chunks = sorted((out / "embeddings").rglob("*.safetensors"))
    chunks[0].write_bytes(b"torn")
    next((out / "thumbnails").iterdir()).unlink()
    assert evaluate(bench) == found
    assert "looked at" in capsys.readouterr().out


def test_a_stopped_evaluation_goes_on(bench, monkeypatch, capsys) -> None:
    embed, count = Embedder._embed, iter(range(100))

    def stopping(self, decoded):
        if next(count) == 3:
            raise KeyboardInterrupt
        return embed(self, decoded)

    monkeypatch.setattr(Embedder, "_embed", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate(bench, "--batch_size=4")
    assert not (bench / "out/results.json").exists()
    capsys.readouterr()
    evaluate(bench, "--batch_size=4")
    assert "looked at 12 pictures" in capsys.readouterr().out


def test_missing_images_are_listed_and_refused(bench) -> None:
    (bench / "images/can/1/0.png").unlink()
    shutil.rmtree(bench / "images/dog2/2")
    refused(bench, r"(?s)images are missing:\n.*can/1: 1 of 2\n.*dog2/2: 0 of 2\n.*--allow_missing")
    found = evaluate(bench, "--allow_missing")
    assert [one.rpartition("images/")[2] for one in found["missing"]] == ["can/1: 1 of 2", "dog2/2: 0 of 2"]
    assert any(note.startswith("scored is what is there: 2") for note in found["notes"])
    assert len(found["images"]) == 15
    refused(bench, r"robot_toy/0: 2 of 4", "--images_per_prompt=4")


def test_bad_images_are_named_and_lose_nothing(bench, capsys) -> None:
    torn, nan, text = bench / "images/can/0/0.png", bench / "images/dog2/1/1.png", bench / "images/robot_toy/2/0.png"
    torn.write_bytes(torn.read_bytes()[:200])
    Image.fromarray(np.full((20, 20), np.nan, dtype=np.float32)).save(nan, format="TIFF")
    text.write_text("no picture")
    refused(
        bench, r"(?s)can/0/0\.png.*dog2/1/1\.png holds numbers that are not finite.*robot_toy/2/0\.png.*--allow_missing"
    )
    capsys.readouterr()
    found = evaluate(bench, "--allow_missing")
    assert len(found["images"]) == 15
    assert len(found["missing"]) == 3
    assert "looked at" not in capsys.readouterr().out.replace("looked at 3 pictures", "")
    noise(np.random.default_rng(3), (100, 100)).save(torn)
    (bench / "subjects/can/00.png").write_text("no picture")
    nan.unlink(), text.unlink()
    assert len(evaluate(bench, "--allow_missing")["photographs"]["can"]) == 2
    for path in (bench / "subjects/robot_toy").iterdir():
        path.write_text("no picture")
    refused(bench, "no photograph of 'robot_toy' can be read", "--allow_missing")


def test_contradictions_are_named_before_any_work(bench, capsys) -> None:
    refused(bench, r"there is no images folder", f"--images={bench / 'none'}")
    (bench / "empty").mkdir()
    refused(bench, r"no generated images in .*empty", f"--images={bench / 'empty'}")
    refused(bench, r"batch_size must be", "--batch_size=0")
    manifest = bench / "images/manifest.jsonl"
    lines = [{"file": "can/0/0.png", "prompt": "a sks can in the jungle", "subject": "can", "prompt_index": 0}]
    lines.append({"file": "can/1/0.png", "prompt": "a can on the beach"})
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("16 images are not in the manifest" in note for note in evaluate(bench)["notes"])
    manifest.write_text(json.dumps({**lines[0], "prompt": "a dog in the jungle"}) + "\n")
    refused(bench, r"can/0/0\.png was drawn for 'a dog in the jungle', but prompt 0 is 'a can in the jungle'")
    manifest.write_text(json.dumps({**lines[0], "prompt_index": 2}) + "\n")
    refused(bench, r"can/0/0\.png is said to be prompt 2 of can")
    manifest.write_text(json.dumps({**lines[0], "file": "can/0/9.png"}) + "\n")
    refused(bench, r"can/0/9\.png, which the manifest names")
    manifest.unlink()
    (bench / "images/can/3").mkdir()
    shutil.copy(bench / "images/can/0/0.png", bench / "images/can/3/0.png")
    refused(bench, r"'3' is no prompt index of can \(0\.\.2\)")
    shutil.move(bench / "images/can/3", bench / "images/stranger/3")
    refused(bench, r"images of stranger, which the subjects folder does not have")
    shutil.rmtree(bench / "images/stranger")
    (bench / "file").write_text("")
    refused(bench, r"file is a file, not a folder", f"--out={bench / 'file'}")
    shutil.rmtree(bench / "subjects/can")
    refused(bench, r"subject 'can' of .* has no pictures")


def test_images_of_several_sizes_and_copies_are_told(bench) -> None:
    noise(np.random.default_rng(9), (300, 200)).save(bench / "images/can/2/1.png")
    shutil.copy(bench / "subjects/can/01.png", bench / "images/can/1/0.png")
    found = evaluate(bench)
    notes = "\n".join(found["notes"])
    assert re.search(r"images of 3 sizes: 100x100 \(16, such as can/0/0.png\)", notes)
    assert "can/1/0.png" in re.search("copy alarm: .*", notes)[0]
    (copied,) = [image for image in found["images"] if image["file"] == "can/1/0.png"]
    assert copied["copied"]
    assert (copied["nearest"], copied["nearest_dino"]) == ("01.png", pytest.approx(1))
    for name in ("can", "dog2"):
        for file in (bench / "images" / name).rglob("*.png"):
            shutil.copy(bench / "subjects" / name / "00.png", file)
    assert any("lies above the bound of real pictures" in note for note in evaluate(bench)["notes"])


def test_objects_alone(toy_data, tmp_path) -> None:
    """Masked scores see the object and not the scene: the same object in other scenes, cut out by the toy SAM."""
    subjects = read_subjects(toy_data / "subjects")[:2]
    for subject in subjects:
        for index, path in enumerate(subject.images[1:3]):
            (tmp_path / f"images/{subject.name}/{index}").mkdir(parents=True)
            load_image(path).convert("RGB").save(tmp_path / f"images/{subject.name}/{index}/0.png")
    segment = make_segmenter("sam")
    scorer = Scorer(load_clip("toyworld"), load_dino("toyworld"), tmp_path, segment=segment, allow_missing=True)
    result = scorer.score(tmp_path / "images", subjects)
    assert result.scores["clip_i_masked"]["mean"] > result.scores["clip_i"]["mean"] + 0.05
    assert result.scores["dino_masked"]["mean"] > 0.9
    # By hand: the mask, the object on white, the cosine.
    clip, (first, second) = load_clip("toyworld"), subjects[0].images[1:3]
    cut = [load_cutout(path, segment) for path in (first, second)]
    white = [Image.new("RGB", one.size, (255, 255, 255)) for one in cut]
    for page, one in zip(white, cut, strict=True):
        page.paste(one, mask=one.getchannel("A"))
    own = clip.images(white)
    image = next(image for image in result.images if image["subject"] == subjects[0].name)
    assert image["clip_i_masked_each"][2] == pytest.approx(float(own[0] @ own[1]), abs=0.02)


def transparent(folder: Path, name: str) -> None:
    Image.new("RGBA", (100, 100), (9, 9, 9, 0)).save(folder / name)


def test_pictures_without_an_object_have_no_masked_scores(bench) -> None:
    """One image, or all photographs of a subject: what is found is scored, the rest is told."""
    for file in [*(bench / "images").rglob("*.png"), *(bench / "subjects").rglob("*.png")]:
        picture = Image.open(file).convert("RGBA")
        alpha = Image.new("L", picture.size, 0)
        alpha.paste(255, (20, 20, 60, 60))
        picture.putalpha(alpha)
        picture.save(file)
    transparent(bench, "images/can/0/0.png")
    found = evaluate(bench, "--segmenter=sam")
    assert "no object was found in 1 images: they have no masked scores" in found["notes"]
    assert "dino_masked" not in found["images"][0]
    assert len(found["images"][1]["dino_masked_each"]) == 3
    transparent(bench, "subjects/can/00.png")
    assert len(evaluate(bench, "--segmenter=sam")["images"][1]["dino_masked_each"]) == 2
    for number in (1, 2):
        transparent(bench, f"subjects/can/0{number}.png")
    found = evaluate(bench, "--segmenter=sam", "--protocol=first_reference")
    assert "dino_masked" not in found["subjects"]["can"]
    assert "dino_masked" in found["subjects"]["dog2"]
    Image.new("L", (5, 5), 255).save(bench / "subjects/dog2/00.mask.png")
    refused(bench, r"dog2/00\.png: its mask is \(5, 5\)", "--segmenter=sam")


def test_bounds_are_of_the_subjects_that_are_scored(bench, capsys) -> None:
    whole = evaluate(bench)
    for name in ("can", "dog2"):
        shutil.rmtree(bench / "images" / name)
    shutil.copy(bench / "subjects/robot_toy/00.png", bench / "images/robot_toy/0/0.png")
    found = evaluate(bench, "--allow_missing", f"--text_only={bench / 'images'}")
    assert "dino" not in found["bounds"]["real"], "its only photograph has no other"
    assert found["bounds"]["copy"]["clip_t"]["mean"] != whole["bounds"]["copy"]["clip_t"]["mean"]
    alarms = [note for note in found["notes"] if "copy alarm" in note]
    assert len(alarms) == 1
    assert "robot_toy/0/0.png" in alarms[0], "a plain copy is told even of a single photograph"


def test_symlinked_photographs(bench) -> None:
    blob = bench / "blob"
    shutil.move(bench / "subjects/can/00.png", blob)
    (bench / "subjects/can/00.png").symlink_to(blob)
    shutil.copy(blob, bench / "images/can/0/0.png")
    found = evaluate(bench)
    assert found["images"][0]["nearest"] == "00.png"
    data = json.loads(re.search(r'id="data">(.*?)</script>', (bench / "out/report.html").read_text(), re.DOTALL)[1])
    assert data["items"][0]["cells"][0]["near"] in data["thumbnails"]


def test_the_hash_knows_the_class_noun(bench) -> None:
    before, listing = evaluate(bench), bench / "subjects/prompts_and_classes.txt"
    listing.write_text(listing.read_text().replace("can,can", "can,bottle"))
    after = evaluate(bench)
    assert before["scores"]["clip_t"] != after["scores"]["clip_t"]
    assert before["hash"] != after["hash"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("can/x,can", "is no line `subject,class`"),
        ("lonely", "is no line"),
        ("can,can", "names the subject 'can' twice"),
    ],
)
def test_lines_of_the_prompts_file_that_are_not_understood(bench, line, message) -> None:
    listing = bench / "subjects/prompts_and_classes.txt"
    listing.write_text(listing.read_text().replace("robot_toy,toy", f"robot_toy, toy\n{line}"))
    refused(bench, message)
