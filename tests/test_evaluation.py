"""Statistics, scoring of folders that anything made, reports and comparisons."""

from __future__ import annotations

import csv
import inspect
import json
import re
import shutil
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_networks import noise, save_benchmark

from benchmarks import sweep
from pig import cli
from pig.data.subjects import load_cutout, prompt_kind, read_subjects
from pig.data.transforms import load_image
from pig.errors import InputError
from pig.evaluation import benchmark
from pig.evaluation.benchmark import Scorer
from pig.evaluation.compare import differences
from pig.evaluation.embeddings import Embedder
from pig.evaluation.figures import Point, plane_svg, read_curve
from pig.evaluation.metrics import SubjectFidelity, SubjectMean
from pig.evaluation.protocols import PROTOCOLS
from pig.evaluation.results import Result
from pig.evaluation.statistics import interval, sign_flip_p
from pig.models.backbone import WEIGHTS
from pig.models.encoders import ClipEncoder, DinoEncoder, load_clip, load_dino
from pig.models.foreground import make_segmenter
from pig.toyworld import scene


@pytest.fixture(scope="module")
def clip() -> ClipEncoder:
    return ClipEncoder(WEIGHTS / "clip")


@pytest.fixture(scope="module")
def dino() -> DinoEncoder:
    return DinoEncoder(WEIGHTS / "dino")


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


def test_intervals_resample_subjects() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.6, 0.2, 50)
    draws = np.sort([rng.choice(values, 50).mean() for _ in range(20_000)])
    low, high = interval(values)
    assert low == pytest.approx(draws[500], abs=0.005)
    assert high == pytest.approx(draws[19_499], abs=0.005)
    assert interval([0.5]) == (0.5, 0.5)
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_micro_means_and_ranks() -> None:
    metric = SubjectMean(3, by_subject=False)
    metric.update(torch.tensor([1.0, 1.0, 1.0, 0.0]), 0)
    metric.update(torch.tensor([[0.25]]), 2)
    assert metric.compute() == pytest.approx(3.25 / 5)


def features_of_rank(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2 + rank, 8, generator=generator), torch.randn(3, 8, generator=generator)


def reduce_in_ranks(rank: int, file: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = SubjectFidelity(2)
    metric.update(*features_of_rank(rank), subject=rank)
    torch.save(metric.compute(), f"{results}{rank}")


def test_metrics_reduce_over_processes(tmp_path) -> None:
    told = (str(tmp_path / "meet"), str(tmp_path / "found"))
    torch.multiprocessing.start_processes(reduce_in_ranks, told, nprocs=2, start_method="fork")
    alone = SubjectFidelity(2)
    for rank in (0, 1):
        alone.update(*features_of_rank(rank), subject=rank)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"found{rank}") == pytest.approx(alone.compute())


def test_weighted_intervals_and_sign_flips() -> None:
    rng = np.random.default_rng(1)
    values, counts = rng.normal(0.6, 0.2, 40), rng.integers(1, 9, 40)
    picks = rng.integers(0, 40, (20_000, 40))
    draws = np.sort((values * counts)[picks].sum(1) / counts[picks].sum(1))
    assert interval(values, counts) == pytest.approx((draws[500], draws[19_499]), abs=0.005)
    # All signs of 6 differences: 2 of 64 give as large a mean as 6 equal ones.
    assert sign_flip_p([0.1] * 6) == pytest.approx(2 / 64)
    assert sign_flip_p([0.3, -0.3, 0.2, -0.2]) == 1.0
    assert sign_flip_p([0.3]) == 1.0
    differences = rng.normal(0.05, 0.2, 40)
    signs = rng.choice([-1, 1], (20_000, 40))
    expected = (np.abs((signs * differences).mean(1)) >= abs(differences.mean())).mean()
    assert sign_flip_p(differences) == pytest.approx(expected, abs=0.02)


def test_prompt_kinds() -> None:
    scenes = [
        "a {0} {1} in the jungle",
        "a photo of a {0} {1}, on a beach",
        "a {0} {1} on top of a purple rug in a forest",
    ]
    assert {prompt_kind(one) for one in scenes} == {"scene"}
    assert {prompt_kind(f"a {{0}} {{1}} {one}") for one in ("wearing a red hat", "in a police outfit")} == {"accessory"}
    assert {prompt_kind(one) for one in ("a red {0} {1}", "a cube shaped {0} {1}", "a wet {0} {1}")} == {"property"}


@pytest.fixture
def bench(tmp_path) -> Path:
    save_benchmark(tmp_path)
    return tmp_path


def evaluate(bench: Path, *more: str, out: str = "out") -> dict:
    cli.run(
        ["evaluate", f"--images={bench / 'images'}", f"--subjects={bench / 'subjects'}", f"--out={bench / out}", *more]
    )
    return json.loads((bench / out / "results.json").read_text())


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


def refused(bench: Path, match: str, *more: str) -> None:
    with pytest.raises(InputError, match=match):
        evaluate(bench, *more)


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
    refused(bench, r"--out: .*file is a file", f"--out={bench / 'file'}")
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
    assert r"| v1[/b] \| ~^\{{data}} |" in (bench / "out/table.md").read_text()
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


def test_report_is_one_file(bench, capsys) -> None:
    listing = bench / "subjects/prompts_and_classes.txt"
    listing.write_text(listing.read_text().replace("in the jungle", "in the <!--<script> jungle"))
    evaluate(bench, "--name=</script><b>", f"--text_only={bench / 'images'}")
    page = (bench / "out/report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
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


def test_evaluation_configs(bench, capsys) -> None:
    """Each config names arguments that there are; one of them, run."""
    configs = sorted(Path("configs/evaluation").glob("*.yaml"))
    assert [path.stem for path in configs] == ["dreambooth", "toyworld"]
    for path in configs:
        told = yaml.safe_load(path.read_text())
        assert set(told) <= set(inspect.signature(benchmark.evaluate).parameters)
        assert told["protocol"] in PROTOCOLS
    found = evaluate(bench, "--config=configs/evaluation/toyworld.yaml")
    assert found["moves"]["segmenter"].startswith("sam ")


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


def test_curves_of_resumed_runs(tmp_path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/dino\n0,0.5,\n10,,0.3\n20,0.25,\n")
    (tmp_path / "resumed.csv").write_text("step,train/loss\n20,0.125\n30,0.1\n")
    curve = read_curve([tmp_path / "metrics.csv", tmp_path / "resumed.csv"], "train/loss")
    assert curve == [(0, 0.5), (20, 0.125), (30, 0.1)]
