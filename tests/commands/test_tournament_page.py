"""A finished tournament's pages: every table, plane, gallery and cost, from results whose numbers are known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tournaments import CONFIG, without_trials

from pig.commands.tournament import plan
from pig.commands.tournament.config import Claim, Tournament, load_config
from pig.commands.tournament.page import find, write_pages
from pig.commands.tournament.run import choose
from pig.errors import InputError
from pig.evaluation.results import Result

DINO = {"bootpig": 0.6, "ezigen": 0.4, "dreambooth": 0.3, "base": 0.1}
SUBJECTS, KINDS = [f"mug_{number:03d}" for number in range(6)], ("accessory", "scene")
BOUND = {
    "real": {"dino": {"mean": 0.9, "low": 0.8, "high": 1.0}},
    "copy": {name: dict.fromkeys(("mean", "low", "high"), 0.7) for name in ("dino", "clip_t")},
}


def write_result(folder: Path, name: str, dino: float) -> None:
    """Two images of each kind of prompt for each subject; the second is a copy. Accessory prompts score .1 lower."""
    images: list[dict[str, Any]] = [
        {
            **{"key": f"{name}{subject}{kind}{seed}", "file": "x.png", "subject": subject, "seed": str(seed)},
            **{"prompt": f"a {kind}", "prompt_index": index, "kind": kind, "copied": seed == 1, "nearest_key": "none"},
            **{"dino": dino - 0.1 * (kind == "accessory"), "clip_i": 0.55, "clip_t": 0.45, "dino_masked": 0.65},
            **{"diversity": 0.25, "nearest": "00.png", "nearest_dino": 0.5},
        }
        for subject in SUBJECTS
        for index, kind in enumerate(KINDS)
        for seed in (0, 1)
    ]
    scores = {one: dict.fromkeys(("mean", "low", "high"), 0.5) for one in ("dino", "clip_i", "clip_t")}
    scores["dino"] = dict.fromkeys(("mean", "low", "high"), dino)
    subjects, photographs = (dict.fromkeys(SUBJECTS, told) for told in ({"dino": dino}, [{"file": "0", "key": "none"}]))
    moves = {"networks": "toy"}
    result = Result("dreambooth", "abc", name, scores, subjects, {}, BOUND, images, photographs, [], [], "", moves)
    folder.mkdir(parents=True)
    result.write(folder)
    (folder / "thumbnails").mkdir()
    for image in images:
        Image.new("RGB", (4, 4)).save(folder / "thumbnails" / f"{image['key']}.jpg")


def write_json(file: Path, told: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(told))


@pytest.fixture
def finished(tmp_path) -> Tournament:
    """The results and costs of three methods and the base model; the second training seed scores .2 higher."""
    told = load_config(CONFIG, [f"out={tmp_path}", "references=[1]", "partial=''", *without_trials()])
    told.methods = {name: told.methods[name] for name in DINO}
    told.claims = [Claim("me", "references help", "bootpig", "base"), Claim("me", "or not", "base", "ezigen")]
    told.claims.append(Claim("me", "guidance", "bootpig", "bootpig, 1 whole picture, common guidance"))
    for one in plan.entries(told):
        for condition in plan.conditions(told, one):
            write_result(one.folder / "scores" / condition.slug, one.method, DINO[one.method] + 0.2 * one.seed)
        cost = {"samples": 4800, "seconds": 120.0, "flops_per_sample": 10**9, "peak_memory_bytes": 2 * 10**9}
        cost["machine"] = "a"
        if told.methods[one.method].kind == "trained":
            write_json(one.folder / "fit" / plan.COST, cost)
        elif told.methods[one.method].kind == "tuned":
            write_json(one.folder / plan.MODELS / "mug_000" / plan.COST, cost | {"samples": 400, "seconds": 60.0})
            (one.folder / plan.MODELS / "mug_000/step-000200").mkdir()
        picture = {"trained_weights": 10_500_000, "flops_per_picture": 28 * 10**9, "seconds_per_picture": 0.5}
        write_json(tmp_path / one.method / "picture.json", {**picture, "peak_memory_bytes": 10**9, "disk_bytes": 10**7})
    return told


def table_of(page: str, heading: str) -> dict[str, list[str]]:
    """A Markdown table's rows by their first cell."""
    (text,) = re.findall(rf"^## {heading}\n\n(.*?)\n\n", page, re.M | re.S)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in rows[2:]} | {"": rows[0]}


def test_the_tables_say_what_was_found(finished, tmp_path) -> None:
    write_pages(finished, [])
    page = (tmp_path / "tournament.md").read_text().replace("\\", "")
    rows = table_of(page, "Standings")
    assert rows[""][1:7] == ["DINO", "CLIP-I", "CLIP-T", "DINO, object alone", "diversity", "copies"]
    # .6 and .8, less .05 for half of the prompts.
    assert rows["bootpig"][:6] == [
        ".650 [.650, .650]",
        *(f"{x} [{x}, {x}]" for x in (".550", ".450", ".650", ".250")),
        "50.0%",
    ]
    assert [rows[name][6] for name in ("bootpig", "ezigen", "ezigen, equal time", "dreambooth", "base")] == [
        *("1 [1, 1]", "2 [2, 2]", "2 [2, 2]", "4 [4, 4]", "5 [5, 5]")
    ]
    assert (rows["bootpig"][8], rows["base"][8]) == (".200", "")  # how far the seeds lie apart
    assert rows["real photographs"][0] == ".900 [.800, 1.000]"
    assert rows["first photograph, copied"][:3] == [".700", "", ".700"]

    gaps = table_of(page, "Differences to bootpig")
    assert set(gaps) == {"", "ezigen", "ezigen, equal time", "dreambooth", "base"}
    assert gaps["ezigen"][0] == "-.200 [-.200, -.200]"
    gaps = table_of(page, "Differences to bootpig under other conditions")
    assert gaps["ezigen, 1 whole picture, common guidance"][0] == "-.200 [-.200, -.200]"
    assert len(gaps) == 2
    kinds = [line for line in page.splitlines() if line.startswith(("| bootpig | accessory", "| bootpig | scene"))]
    assert [line.split("|")[3].strip() for line in kinds] == [".600", ".700"]
    # The first training seed alone, with which both were drawn.
    for given in ("1 whole picture", "1 whole picture, common guidance"):
        assert f"| bootpig | {given} | .550 [.550, .550] |" in page
    assert "ezigen, equal time" not in table_of(page, "Other conditions")  # it has one

    claims = table_of(page, "Claims")
    assert (claims["references help"][0], claims["references help"][1]) == ("cannot be told", "+.600 [+.600, +.600]")
    assert claims["or not"][1] == "-.400 [-.400, -.400]"
    assert claims["guidance"][0] == "the same images"  # not with a second seed on one side


def test_the_ledger_says_what_it_cost(finished, tmp_path) -> None:
    write_pages(finished, [])
    rows = table_of((tmp_path / "tournament.md").read_text(), "Costs")
    shown = dict(zip(rows[""][1:5], rows["bootpig"][:4], strict=True))
    assert shown == {"trained weights, M": "10.5", "training: samples": "4,800", "minutes": "2", "TFLOP": "4.8"}
    assert rows["bootpig"][4] == "2"  # GB
    assert rows["bootpig"][-4:] == ["28", "0.5", "1", "10"]
    assert rows["dreambooth"][5:9] == ["400", "1", "0.4", "2"]  # samples, minutes, TFLOP and GB of a subject
    assert rows["base"][:9] == ["10.5", *[""] * 8]
    costs = json.loads((tmp_path / "tournament.json").read_text())["costs"]
    assert [row["method"] for row in costs] == ["bootpig", "ezigen", "ezigen, equal time", "dreambooth", "base"]


def test_the_settings_are_shown_with_what_they_were_chosen_from(finished, tmp_path) -> None:
    trials = {"--image_guidance=3": 0.5, "--image_guidance=5": 0.7}
    finished.methods["bootpig"].trials = list(trials)
    for number, dino in enumerate(trials.values()):
        write_result(plan.trial_folder(finished, "bootpig", number) / "scores", f"trial_{number}", dino)
    choose(finished)
    write_pages(finished, [])
    page = (tmp_path / "tournament.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "guidance=" in line]
    assert rows == [
        ["bootpig", "--image_guidance=3", ".500", ".500", ""],
        ["bootpig", "--image_guidance=5", ".700", ".500", "chosen"],
    ]
    assert "| ezigen |  |  |  | no trials |" in page
    told = json.loads((tmp_path / "tournament.json").read_text())["trials"]
    assert told["bootpig"]["--image_guidance=5"] == {"dino": 0.7, "clip_t": 0.5}


def test_the_report_shows_planes_and_all_images_side_by_side(finished, tmp_path) -> None:
    write_pages(finished, [])
    page, drawn = (tmp_path / "report.html").read_text(), (tmp_path / "plane.svg").read_text()
    assert drawn in page
    assert page.count("FLOPs of tuning, class pictures and one picture") == 2  # over DINO and over CLIP-T
    for label in (*DINO, "equal time", "first photograph, copied", "real photographs"):
        assert f">{label}<" in drawn, label
    (data,) = re.findall(r'\{"methods".*\}', page)
    gallery = json.loads(data)
    assert gallery["methods"] == list(DINO)
    assert len(gallery["items"]) == len(SUBJECTS) * len(KINDS) * 2
    assert all(len(item["cells"]) == 4 and None not in item["cells"] for item in gallery["items"])
    assert len(gallery["thumbnails"]) >= 4 * len(gallery["items"])


def test_results_of_other_networks_are_refused(finished, tmp_path) -> None:
    one = plan.entries(finished)[2]
    folder = one.folder / "scores" / plan.conditions(finished, one)[0].slug
    replace(Result.read(folder), moves={"networks": "others"}).write(folder)
    with pytest.raises(InputError, match="differ in networks: their scores mean different things"):
        find(finished, [])
