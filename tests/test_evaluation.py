"""Scores against independent computations by plain loops, and scoring a folder that anything made."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from benchmarks import sweep
from pig.data.grids import labelled_grid
from pig.data.images import Job, save_generated
from pig.data.subjects import read_subjects
from pig.evaluation.benchmark import score_folder
from pig.evaluation.metrics import SubjectMean
from pig.evaluation.report import Point, plane_svg, read_curve, score_table, write_report
from pig.evaluation.statistics import interval
from pig.models.backbone import WEIGHTS
from pig.models.encoders import ClipEncoder, DinoEncoder
from pig.toyworld import scene


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return ClipEncoder(WEIGHTS / "clip")


@pytest.fixture(scope="module")
def dino() -> DinoEncoder:
    return DinoEncoder(WEIGHTS / "dino")


def pixels(picture: Image.Image, resize: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Bicubic to `resize`, centre crop 64, standardise; by PIL and numpy alone."""
    array = np.asarray(picture.resize((resize, resize), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    margin = round((resize - 64) / 2)
    array = array[margin : margin + 64, margin : margin + 64]
    return torch.from_numpy(((array - mean) / std).transpose(2, 0, 1)).float()[None]


def test_scores_equal_plain_loops(toy_data, tmp_path, clip, dino) -> None:
    subjects = read_subjects(toy_data / "subjects")[:3]
    rng = np.random.default_rng(0)
    for subject, count in zip(subjects, (3, 1, 2), strict=True):
        for seed in range(count):
            picture = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            save_generated(tmp_path, Job(subject, seed, seed), picture, method="noise", settings={})
    scores = score_folder(tmp_path, subjects, clip, dino)

    clip_model = CLIPModel.from_pretrained(WEIGHTS / "clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "clip")
    vit = ViTModel.from_pretrained(WEIGHTS / "dino", dtype=torch.float32, add_pooling_layer=False).eval()
    clip_mean, clip_std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    dino_mean, dino_std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm()

    def clip_image(picture: Image.Image) -> torch.Tensor:
        return unit(
            clip_model.visual_projection(clip_model.vision_model(pixels(picture, 64, clip_mean, clip_std))[1])[0]
        )

    def clip_text(text: str) -> torch.Tensor:
        ids = tokenizer([text], padding="max_length", max_length=32, return_tensors="pt").input_ids
        return unit(clip_model.text_projection(clip_model.text_model(ids)[1])[0])

    def dino_image(picture: Image.Image) -> torch.Tensor:
        return unit(vit(pixels(picture, 73, dino_mean, dino_std)).last_hidden_state[0, 0])

    means: dict[str, list[float]] = {"dino": [], "clip_i": [], "clip_t": [], "background_accuracy": []}
    with torch.no_grad():
        for subject in subjects:
            values: dict[str, list[float]] = {name: [] for name in means}
            for path in sorted((tmp_path / subject.name).glob("*/*.png")):
                picture, index = Image.open(path), int(path.parent.name)
                for real_path in subject.images:
                    real = Image.open(real_path).convert("RGB")
                    values["dino"].append(float(dino_image(picture) @ dino_image(real)))
                    values["clip_i"].append(float(clip_image(picture) @ clip_image(real)))
                similarity = [float(clip_image(picture) @ clip_text(prompt)) for prompt in subject.prompts]
                values["clip_t"].append(similarity[index])
                values["background_accuracy"].append(float(np.argmax(similarity) == index))
            for name, one in values.items():
                means[name].append(float(np.mean(one)))
    for name, per_subject in means.items():
        assert scores[name] == pytest.approx(float(np.mean(per_subject)), abs=1e-5), name


def test_subject_mean_averages_within_subjects_first() -> None:
    metric = SubjectMean(3)
    metric.update(torch.tensor([1.0, 1.0, 1.0, 0.0]), 0)
    metric.update(torch.tensor([[0.25]]), 2)
    assert metric.compute() == pytest.approx((0.75 + 0.25) / 2)


def test_score_networks_tell_subjects_and_prompts_apart(toy_data, clip, dino) -> None:
    """Real against real is far above real against another subject of the category; CLIP finds the background."""
    rows = []
    for number in range(24):
        subject = scene.make_subject(scene.HELD_OUT_SEED + 500 + number, category="mug")
        pair = [scene.draw(subject, scene.training_background("mug", number + i), 10 * number + i) for i in range(2)]
        rows.append([Image.fromarray(drawing.image) for drawing in pair])
    first, second = dino.images([row[0] for row in rows]), dino.images([row[1] for row in rows])
    similarity = first @ second.T
    other = similarity[~torch.eye(24, dtype=torch.bool)]
    assert similarity.diagonal().mean() > 0.8
    assert other.mean() < 0.4
    texts = clip.texts([scene.caption("mug", name) for name in scene.BACKGROUNDS])
    found = (clip.images([row[0] for row in rows]) @ texts.T).argmax(1)
    wanted = [list(scene.BACKGROUNDS).index(scene.training_background("mug", number)) for number in range(24)]
    assert (found == torch.tensor(wanted)).float().mean() > 0.95


def test_report_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/dino\n0,0.5,\n10,,0.3\n20,0.25,\n")
    (tmp_path / "resumed.csv").write_text("step,train/loss\n20,0.125\n30,0.1\n")
    curve = read_curve([tmp_path / "metrics.csv", tmp_path / "resumed.csv"], "train/loss")
    assert curve == [(0, 0.5), (20, 0.125), (30, 0.1)]
    picture = Image.new("RGB", (8, 8), (255, 0, 0))
    labelled_grid(["a", "b"], [("one", [picture, picture])], size=32).save(tmp_path / "grid.png")
    scores = {"trained": {"dino": 0.5, "clip_t": 0.25}}
    write_report(
        tmp_path / "report.html",
        title="T <b>",
        summary=["s"],
        scores=scores,
        grid_png=tmp_path / "grid.png",
        curve=curve,
        settings="x: <1>",
    )
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "T &lt;b&gt;" in page
    assert "<td>0.500</td>" in page
    assert "x: &lt;1&gt;" in page
    assert score_table(scores).row_count == 1
    json.dumps(scores)


def test_intervals_resample_subjects() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.6, 0.2, 50)
    draws = np.sort([rng.choice(values, 50).mean() for _ in range(20_000)])
    low, high = interval(values)
    assert low == pytest.approx(draws[500], abs=0.005)
    assert high == pytest.approx(draws[19_499], abs=0.005)
    assert interval([0.5]) == (0.5, 0.5)
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_the_plane_shows_every_setting_apart() -> None:
    rng = np.random.default_rng(0)
    names = [f"setting <{i}>" for i in range(8)]
    points = [Point(name, {s: list(rng.normal(0.5, 0.01, 9)) for s in ("dino", "clip_t")}) for name in names]
    svg = xml.etree.ElementTree.fromstring(plane_svg(points))
    labels = {e.text: (float(e.get("x")), float(e.get("y"))) for e in svg.iter() if e.text in names}
    assert set(labels) == set(names)
    places = list(labels.values())
    assert all(abs(a[1] - b[1]) > 10 or abs(a[0] - b[0]) > 60 for i, a in enumerate(places) for b in places[:i])
    assert len([e for e in svg.iter() if e.tag.endswith("circle")]) == 8


def test_a_sweep_of_settings(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sweep, "SEEDS", (0,))
    monkeypatch.setattr(sweep, "USUAL", {**sweep.USUAL, "num_inference_steps": 2})
    tables = {"Guidance": {"1 / 1.5": (1, "unipc", {"image_guidance": 1.0})}, "Scheduler": {"ddim": (2, "ddim", {})}}
    monkeypatch.setattr(sweep, "TABLES", tables)
    monkeypatch.setattr("sys.argv", ["sweep", "--out", str(tmp_path), "--subjects", "3"])
    sweep.main()
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert set(found) == {sweep.USUAL_NAME, "1 / 1.5", "ddim"}
    assert all(len(scores["dino"]) == 3 for scores in found.values())
    text = (tmp_path / "sweep.md").read_text()
    scores = found["ddim"]["dino"]
    assert f"| ddim | {sum(scores) / 3:.3f} [{min(scores):.3f}, {max(scores):.3f}]" in text
    before = (tmp_path / "ddim/manifest.jsonl").stat().st_mtime_ns
    sweep.main()
    assert (tmp_path / "ddim/manifest.jsonl").stat().st_mtime_ns == before
    assert "3 of 3 images are finished" in capsys.readouterr().out
