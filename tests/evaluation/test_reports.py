"""Reports, comparison, figures."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from benches import evaluate, refused
from PIL import Image
from small_networks import noise

from benchmarks import sweep
from pig import cli
from pig.arguments import parse
from pig.errors import InputError
from pig.evaluation import report
from pig.evaluation.compare import Difference, compare, corrected, corrected_by_score, differences
from pig.evaluation.figures import Point, plane_svg, read_curve
from pig.evaluation.protocols import PROTOCOLS
from pig.evaluation.results import Result
from pig.evaluation.statistics import holm, interval, sign_flip_p
from pig.evaluation.study import questions
from pig.pages import Markup, columns_of_words, render


def test_odd_names(bench, capsys) -> None:
    """Blanks in subjects, brackets and pipes in methods and seeds, hidden files, files that name one image twice."""
    for folder in ("images", "subjects"):
        shutil.move(bench / folder / "robot_toy", bench / folder / "robot toy")
        (bench / folder / "can/._0.png").write_text("macOS")
    (bench / "images/can/0/._0.png").write_text("macOS")
    listing = bench / "subjects/prompts_and_classes.txt"
    listing.write_text(listing.read_text().replace("robot_toy,toy", "robot toy,toy").replace("dog2,dog", "dog2, dog"))
    shutil.move(bench / "images/can/0/0.png", bench / "images/can/0/x[red]|~^y.png")
    found = evaluate(bench, "--name=v1[/b] | ~^\\{{data}}")
    assert set(found["subjects"]) == {"can", "dog2", "robot toy"}
    assert found["groups"]["live"]
    assert "v1[/b]" in capsys.readouterr().out
    assert r"| v1\[/b] \| ~^\{{data}} |" in (bench / "out/table.md").read_text()
    assert (
        r"v1[/b] | \textasciitilde{}\textasciicircum{}\textbackslash{}\{\{data\}\}"
        in (bench / "out/table.tex").read_text()
    )
    assert (bench / "out/report.html").read_text().count('"methods"') == 1
    Image.new("RGB", (9, 9)).save(bench / "images/can/1/0.jpg")
    refused(bench, r"can/1 has several files 0\.\* \(1 such\)")
    (bench / "images/can/1/0.jpg").unlink()
    (bench / "images/can/01").mkdir()
    shutil.copy(bench / "images/can/1/0.png", bench / "images/can/01/0.png")
    refused(bench, r"'01' is no prompt index")
    shutil.rmtree(bench / "images/can/01")
    (bench / "images/manifest.jsonl").write_bytes(b'{"file": 5}\n\xff\xfe\n')
    evaluate(bench)
    refused(bench, "lies in the images folder", f"--out={bench / 'images/can'}")
    refused(bench, "images_per_prompt must be", "--images_per_prompt=0")
    templates = listing.read_text().replace("a {0} {1} on the beach", "a {1} named {0}, on the beach")
    listing.write_text(templates)
    assert evaluate(bench)["images"][0]["subject"] == "can"


def places(tree: Any, at: tuple = ()) -> Iterator[tuple]:
    """Of all entries; of a list, the first one's."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ():
        yield (*at, key)
        yield from places(value, (*at, key))


def test_whatever_stands_in_a_result(bench, tmp_path, monkeypatch) -> None:
    """Any value in place of any other: refused, or compared, shown and asked about."""
    whole = evaluate(bench)
    monkeypatch.setattr(report, "plane_svg", lambda *_: "")  # half a second each
    values = ["", None, 5, True, "\ud800", [], {}, 10**400, [1], {"a": 1}, [{}]]
    accepted = 0
    for place, value in random.Random(0).sample([(p, v) for p in places(whole) for v in values], 300):
        told = copy.deepcopy(whole)
        node = told
        for key in place[:-1]:
            node = node[key]
        if value == "":
            del node[place[-1]]
        else:
            node[place[-1]] = value
        (tmp_path / "results.json").write_text(json.dumps(told))
        with suppress(InputError):
            Result.read(tmp_path)
            accepted += 1
            compare([tmp_path, bench / "out"], tmp_path / "compared")
            compare([bench / "out", tmp_path], tmp_path / "compared")
            questions(Result.read(tmp_path), Result.read(bench / "out"), 6, 0)
    assert 0 < accepted < 300


def test_report_is_one_file(bench, capsys) -> None:
    listing = bench / "subjects/prompts_and_classes.txt"
    listing.write_text(listing.read_text().replace("in the jungle", "in the <!--<script> jungle"))
    evaluate(bench, "--name=</script><b>", f"--text_only={bench / 'images'}")
    page = (bench / "out/report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "{{" not in page.split("<script", 1)[0]
    assert "&lt;/script&gt;&lt;b&gt;" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["methods"] == ["</script><b>"]
    assert len(data["items"]) == 18
    assert all(cell["key"] in data["thumbnails"] for item in data["items"] for cell in item["cells"])
    assert "base model, text only" in page
    assert "cluster bootstrap" in page


def test_compare_pairs_images(bench, capsys) -> None:
    first = evaluate(bench, "--name=a", out="a")
    shutil.copytree(bench / "images", bench / "other")
    for number, file in enumerate(sorted((bench / "other").rglob("*.png"))):
        noise(np.random.default_rng(100 + number), (100, 100)).save(file)
    for file in (bench / "other").rglob("1.png"):
        file.unlink()
    second = evaluate(bench, "--name=b", f"--images={bench / 'other'}", out="b")
    capsys.readouterr()
    cli.run(["compare", str(bench / "a"), str(bench / "b"), f"--out={bench / 'both'}"])
    both = differences(Result.read(bench / "a"), Result.read(bench / "b"))
    theirs = {image["file"]: image["dino"] for image in second["images"]}
    gaps = {}
    for image in first["images"]:
        if image["file"] in theirs:
            gaps.setdefault(image["subject"], []).append(image["dino"] - theirs[image["file"]])
    means = [np.mean(of) for of in gaps.values()]
    assert [one.score for one in both] == ["dino", "clip_i", "clip_t"]
    assert both[0].mean == pytest.approx(np.mean(means))
    assert (both[0].low, both[0].high) == pytest.approx(interval(means))
    assert both[0].p == pytest.approx(sign_flip_p(means))
    data = json.loads(re.search(r'id="data">(.*?)</script>', (bench / "both/report.html").read_text(), re.DOTALL)[1])
    assert [sum(cell is not None for cell in item["cells"]) for item in data["items"]] == [2, 1] * 9
    page = (bench / "both/report.html").read_text()
    assert "Differences" in page
    assert "9 images of a and 0 of b have no partner" in page
    evaluate(bench, "--protocol=micro", out="micro")
    with pytest.raises(InputError, match=r"differ in protocol: their scores mean different things"):
        cli.run(["compare", str(bench / "a"), str(bench / "micro"), f"--out={bench / 'both'}"])
    for out, message in (
        (bench / "a", "whose report it would replace"),
        (bench / "a/results.json", "is a file, not a"),
    ):
        with pytest.raises(InputError, match=message):
            cli.run(["compare", str(bench / "a"), str(bench / "b"), f"--out={out}"])
    with pytest.raises(InputError, match="holds no results.json"):
        cli.run(["compare", str(bench / "a"), str(bench / "images"), f"--out={bench / 'both'}"])
    with pytest.raises(InputError, match="at least two"):
        cli.run(["compare", str(bench / "a"), f"--out={bench / 'both'}"])


def test_several_comparisons_are_corrected() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x .01, then 2 x .03, then no less
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    found = [Difference(other, score, 0, 0, 0, p, 9) for other, score, p in (("b", "dino", 0.01), ("c", "dino", 0.5))]
    found.append(Difference("b", "clip_t", 0, 0, 0, 0.02, 9))
    assert [one.p_holm for one in corrected_by_score(found)] == pytest.approx([0.02, 0.5, 0.02])
    assert [one.p_holm for one in corrected(found)] == pytest.approx([0.03, 0.5, 0.04])


def test_evaluation_configs(bench, capsys) -> None:
    """Each config names arguments that there are; one of them, run."""
    configs = sorted(Path("configs/evaluation").glob("*.yaml"))
    assert [path.stem for path in configs] == ["dreambooth", "toyworld"]
    for path in configs:
        told = yaml.safe_load(path.read_text())
        _, values = parse(
            "evaluate", "pig.evaluation.benchmark:evaluate", ["--images=a", "--out=b", f"--config={path}"]
        )
        assert told["protocol"] in PROTOCOLS
        taken = {**values, **asdict(values["photographs"]), **asdict(values["scoring"])}
        assert {name: str(taken[name]) for name in told} == {name: str(value) for name, value in told.items()}
    found = evaluate(bench, "--config=configs/evaluation/toyworld.yaml")
    assert found["moves"]["segmenter"].startswith("sam ")


def test_the_plane_shows_every_setting_apart() -> None:
    rng = np.random.default_rng(0)
    names = [f"setting <{i}>" for i in range(8)]
    points = [Point(name, {s: list(rng.normal(0.5, 0.01, 9)) for s in ("dino", "clip_t")}) for name in names]
    svg = xml.etree.ElementTree.fromstring(plane_svg(points))
    labels = {}
    for e in svg.iter():
        if e.text in names:
            width = 50  # of these names, at 9 pixels
            left = float(e.get("x")) - width * ("text-anchor: end" in e.get("style"))
            labels[e.text] = (left, float(e.get("y")))
    assert set(labels) == set(names)
    places = list(labels.values())
    assert all(abs(a[1] - b[1]) > 8 or abs(a[0] - b[0]) > 45 for i, a in enumerate(places) for b in places[:i])
    assert plane_svg(points) == plane_svg(points)


def test_the_plane_ties_longer_trainings_to_their_points() -> None:
    scores = {"dino": [0.2, 0.4], "clip_t": [0.4, 0.4]}
    points = [Point("a", scores, {"dino": [0.6], "clip_t": [0.4]}), Point("b", scores, scores), Point("c", scores)]
    lines = [e.text for e in xml.etree.ElementTree.fromstring(plane_svg(points, longer="in more time")).iter()]
    assert lines.count("in more time") == 1  # in the legend
    assert "in more time" not in plane_svg(points[2:], longer="in more time")


def test_columns_of_words_are_set_left() -> None:
    rows = [("a_1", ".5 [.4, .6]", "1 picture"), ("b", Markup(".5 <small>[.4, .6]</small>"), ""), ("c",)]
    assert columns_of_words(rows, 4) == [True, False, True, False]
    assert columns_of_words([], 2) == [False, False]


def test_a_table_may_have_no_rows(tmp_path) -> None:
    template = tmp_path / "page.html"
    template.write_text('{% from "table.html" import table %}{{ table(["a", "b"], rows) }}')
    assert "<th>b</th>" in render(template, rows=[])
    assert "<td>1</td>" in render(template, rows=[("", ["1"])])


def test_a_sweep_of_settings(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sweep, "USUAL", {**sweep.USUAL, "num_inference_steps": 2})
    tables = {
        "Guidance": {"1 / 1.5": {"image_guidance": 1.0}},
        "Scheduler": {"ddim": {"references": 2, "scheduler": "ddim"}},
        "Partial pictures": {"1 partial": {"partial": True}, "4 partial": {"references": 4, "partial": True}},
    }
    usual = sweep.METHODS["bootpig"][0]
    monkeypatch.setitem(sweep.METHODS, "bootpig", (usual, {}, tables))
    monkeypatch.setattr("sys.argv", ["sweep", "--out", str(tmp_path), "--subjects", "3", "--seeds", "1"])
    sweep.main()
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert set(found) == {usual, "1 / 1.5", "ddim", "1 partial", "4 partial"}
    assert found["1 partial"] != found[usual]
    assert all(len(scores["dino"]) == 3 for scores in found.values())
    text = (tmp_path / "sweep.md").read_text()
    scores = found["ddim"]["dino"]
    low, high = interval(scores)
    assert f"| ddim | {sum(scores) / 3:.3f} [{low:.3f}, {high:.3f}]" in text
    gap = sum(found["4 partial"]["dino"]) / 3 - sum(found["1 partial"]["dino"]) / 3
    assert re.search(rf"\| 4 partial \| \S+ \[.*?\] \| {re.escape(f'{gap:+.3f}')} ", text)
    before = (tmp_path / "ddim/manifest.jsonl").stat().st_mtime_ns
    sweep.main()
    assert (tmp_path / "ddim/manifest.jsonl").stat().st_mtime_ns == before
    assert "3 of 3 images are finished" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*sys.argv, "--tables", "Scheduler"])
    sweep.main()
    assert set(json.loads((tmp_path / "sweep.json").read_text())) == {usual, "ddim"}
    monkeypatch.setattr("sys.argv", [*sys.argv, "Nothing"])
    with pytest.raises(SystemExit):
        sweep.main()
    assert "--tables 'Nothing' is none of: Guidance; Scheduler; Partial pictures" in capsys.readouterr().err


def test_curves_of_resumed_runs(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/dino\n0,0.5,\n10,,0.3\n20,0.25,\n")
    (tmp_path / "resumed.csv").write_text("step,train/loss\n20,0.125\n30,0.1\n")
    curve = read_curve([tmp_path / "metrics.csv", tmp_path / "resumed.csv"], "train/loss")
    assert curve == [(0, 0.5), (20, 0.125), (30, 0.1)]
