"""The blind study: what raters see, what is kept, and the win rates; over real HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from small_networks import save_benchmark

from pig import cli
from pig.errors import InputError
from pig.evaluation.results import Result
from pig.evaluation.statistics import rate_interval
from pig.evaluation.study import Study, handler_of


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result]:
    """Two methods: reds and greens, so that a picture tells whose it is."""
    folder = tmp_path_factory.mktemp("study")
    images, subjects = save_benchmark(folder)
    for name, colour in (("reds", (200, 20, 20)), ("greens", (20, 200, 20))):
        for file in images.rglob("*.png"):
            copy = folder / name / file.relative_to(images)
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour).save(copy)
        cli.run(
            ["evaluate", f"--images={folder / name}", f"--subjects={subjects}", f"--out={folder / ('out_' + name)}"]
        )
    return Result.read(folder / "out_reds"), Result.read(folder / "out_greens")


@pytest.fixture
def study(results, tmp_path) -> Study:
    return Study(*results, tmp_path / "study", pairs=6)


def ask(address: str, told: dict | None = None) -> bytes:
    data = None if told is None else json.dumps(told).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data), timeout=10) as reply:
        return reply.read()


@pytest.fixture
def page(study) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(study))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def is_red(study: Study, token: str) -> bool:
    pixel = Image.open(study.paths[token]).convert("RGB").getpixel((8, 8))
    return pixel == (200, 20, 20)


def test_a_rater_answers_all(study, page) -> None:
    """Who prefers red in the subject question and green in the prompt question is counted so."""
    assert b"Which picture is better?" in ask(page)
    sides: Counter = Counter()
    while (item := json.loads(ask(f"{page}/next?rater=ann")))["id"]:
        assert not re.search("reds|greens|out_|check", json.dumps(item)), "the page must not know whose picture it is"
        assert bool(item["references"]) == ("object of the reference" in item["question"])
        assert bool(item["text"]) == ("text" in item["question"])
        assert all(ask(f"{page}/picture/{token}")[:4] == b"\x89PNG" for token in (item["left"], item["right"]))
        if study.items[item["id"]].check:
            right = study.items[item["id"]].pictures[0]
            choice = "left" if study.paths[item["left"]] == right else "right"
        else:
            wants_red = bool(item["references"])
            choice = "left" if is_red(study, item["left"]) == wants_red else "right"
            sides[choice] += 1
        ask(f"{page}/answer", {"rater": "ann", "id": item["id"], "choice": choice})
    assert item["done"] == item["total"] == 6 * 2 + 1
    assert min(sides.values()) >= 2, "sides are shuffled"
    rates = study.found()["rates"]
    assert (rates["subject"]["mean"], rates["subject"]["answers"]) == (1.0, 6)
    assert (rates["prompt"]["mean"], rates["prompt"]["answers"]) == (0.0, 6)
    text = study.write_found()
    assert "| reds preferred to greens |" in text
    low, high = rate_interval([1.0] * 3, [2] * 3)  # unanimous, and still not certain
    assert f"| subject | 100.0% | {low:.1%} to {high:.1%} | 6 |" in text
    assert low < 0.6
    assert text in (study.out / "study.md").read_text()


def test_stopped_and_resumed(study, results, page) -> None:
    first = json.loads(ask(f"{page}/next?rater=bob"))
    for _ in range(2):  # a double click
        ask(f"{page}/answer", {"rater": "bob", "id": first["id"], "choice": "left"})
    with (study.out / "answers.jsonl").open("a") as stream:
        stream.write('{"rater": "bob", "id"')  # torn by a crash
    again = Study(*results, study.out, pairs=6)
    assert list(again.answers) == [("bob", first["id"])]
    assert again.next("bob")["done"] == 1
    assert again.next("bob")["id"] not in ("", first["id"])
    assert again.order("bob") == study.order("bob") != again.order("eve")
    second = again.next("bob")["id"]
    again.answer("bob", second, "right")
    assert [key for _, key in Study(*results, study.out, pairs=6).answers] == [first["id"], second]
    with pytest.raises(InputError, match="answers to another study"):
        Study(*results, study.out, pairs=5)
    shown = next(path for item in study.items.values() for path in item.pictures)
    before = shown.read_bytes()
    Image.new("RGB", (16, 16), (0, 0, 200)).save(shown)
    with pytest.raises(InputError, match="its pictures have changed since"):
        Study(*results, study.out, pairs=6)
    shown.write_bytes(before)
    with (study.out / "answers.jsonl").open("a") as stream:
        stream.write('5\nnull\n{"rater": [], "id": "x"}\n')
    assert len(Study(*results, study.out, pairs=6).answers) == 2
    with pytest.raises(InputError, match="is a file, not a folder"):
        Study(*results, study.out / "answers.jsonl", pairs=6)


def test_who_fails_the_checks_is_left_out(study) -> None:
    for rater, attentive in (("ann", True), ("idle", False)):
        for item in study.items.values():
            left = study.sides(rater, item)[0] == item.pictures[0]
            wants_first = attentive or not item.check
            study.answer(rater, item.id, "left" if left == wants_first else "right")
    found = study.found()
    assert found["left_out"] == ["idle"]
    assert found["rates"]["subject"]["answers"] == 6
    assert "2 raters, of whom 1 failed" in study.write_found()


def test_odd_requests(study, page) -> None:
    for told in (
        {},
        {"rater": "x", "id": "none", "choice": "left"},
        {"rater": "", "id": next(iter(study.items)), "choice": "left"},
    ):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(f"{page}/answer", told)
    for path in ("/picture/../../etc/passwd", "/picture/none", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(page + path)
    assert not (study.out / "answers.jsonl").exists()


def test_bad_input(results, tmp_path) -> None:
    reds, greens = (str(one.folder) for one in results)
    with pytest.raises(InputError, match="two folders of results, got 1"):
        cli.run(["study", reds, f"--out={tmp_path}"])
    with pytest.raises(InputError, match="holds no results.json"):
        cli.run(["study", reds, str(tmp_path), f"--out={tmp_path}"])
    with pytest.raises(InputError, match="pairs must be at least 1|pairs must be between"):
        cli.run(["study", reds, greens, f"--out={tmp_path}", "--pairs=0"])


def test_the_command(results, tmp_path) -> None:
    reds, greens = (str(one.folder) for one in results)
    command = [
        sys.executable,
        "-u",
        "-m",
        "pig.cli",
        "study",
        reds,
        greens,
        f"--out={tmp_path}",
        "--port=0",
        "--pairs=3",
    ]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells' background jobs ignore it
    )
    assert running.stdout is not None
    lines = [running.stdout.readline(), running.stdout.readline()]
    address = re.search(r"http://localhost:\d+", lines[1])[0]
    assert "7 questions; 0 answers so far" in lines[0]
    item = json.loads(ask(f"{address}/next?rater=ann"))
    ask(f"{address}/answer", {"rater": "ann", "id": item["id"], "choice": "left"})
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    rest, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    assert "win rate" in rest
    assert len((Path(tmp_path) / "answers.jsonl").read_text().splitlines()) == 1
