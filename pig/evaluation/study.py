"""`study A B`: a blind pairwise study with people (BootPIG, arXiv 2401.13974, section 4.1; after ELITE).

Two questions, asked apart: which of two images shows the subject better, and which shows the prompt better. Served by
Python's own http.server: a page and three addresses need no framework.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlparse

from rich.console import Console

from pig.data.transforms import load_image
from pig.errors import InputError, check_kinds, check_ranges
from pig.evaluation.compare import named_apart, place_of
from pig.evaluation.results import Result
from pig.evaluation.statistics import rate_interval
from pig.evaluation.tables import plain
from pig.files import make_folder, parse_json, sha256_of, write_text

PAGE = Path(__file__).with_suffix(".html")
FIELDS = {"rater": str, "id": str, "question": str, "subject": str, "check": bool, "first": bool}  # of an answer
ANSWERS, PLAN, FOUND = "answers.jsonl", "study.json", "study.md"
CHECK_EVERY = 10  # questions for one attention check
ATTENTIVE = 0.8  # the share of checks that a rater must have right to count
Question = Literal["subject", "prompt"]
ASKED: Mapping[Question, str] = {
    "subject": "Which picture shows the object of the reference better?",
    "prompt": "Which picture shows the text better?",
}
console = Console(soft_wrap=True)


@dataclass(frozen=True)
class Item:
    """One question about two pictures. A check has a right answer: its first picture. `id` tells raters nothing."""

    id: str
    place: str
    question: Question
    subject: str
    text: str
    references: tuple[Path, ...]
    pictures: tuple[Path, Path]
    check: bool = False


def study(results: list[Path], /, out: Path, pairs: int = 100, seed: int = 0, port: int = 7861) -> None:
    """Ask people, on a local page, which of two methods' images they prefer; stop with Ctrl-C, start again to go on.

    Args:
        results: the two folders of `evaluate`.
        out: where the answers go, as they come (answers.jsonl), and the win rates (study.md).
        pairs: of images of the same subject, prompt and seed; evenly over subjects. Each is asked two questions.
        seed: of the choice.
        port: of the page.
    """
    if len(results) != 2:
        raise InputError(f"study needs two folders of results, got {len(results)}")
    check_ranges(pairs=(pairs, 1, 10**6), port=(port, 0, 65535))
    both = named_apart([Result.read(folder) for folder in results])
    asking = Study(both[0], both[1], out, pairs, seed)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler_of(asking))
    except OSError as error:
        raise InputError(f"port {port}: {error.strerror}; give another --port") from error
    console.print(
        f"{len(asking.items)} questions; {len(asking.answers)} answers so far in {out / ANSWERS}\n"
        f"the page: http://localhost:{server.server_port}  (Ctrl-C ends it and prints the win rates)"
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        console.print(asking.write_found(), highlight=False, markup=False)


class Study:
    """The questions, and the answers so far.

    Raises:
        InputError: no images in common, missing files, or a folder that holds answers to other questions.
    """

    def __init__(self, first: Result, second: Result, out: Path, pairs: int = 100, seed: int = 0) -> None:
        self.names, self.out, self.seed = (first.name, second.name), out, seed
        self.items = {item.id: item for item in questions(first, second, pairs, seed)}
        files = {path for item in self.items.values() for path in (*item.references, *item.pictures)}
        if gone := [path for path in sorted(files) if not path.exists()]:
            raise InputError(
                f"{gone[0]} is gone (and {len(gone) - 1} more): the study shows the files that were scored"
            )
        # What a page asks for says nothing about whose picture it is.
        secret = os.urandom(16)
        self.tokens = {path: hashlib.sha256(secret + str(path).encode()).hexdigest()[:24] for path in files}
        self.paths = {token: path for path, token in self.tokens.items()}
        plan = {"names": list(self.names), "hashes": [first.hash, second.hash], "pairs": pairs, "seed": seed}
        digests = [sha256_of(path) for path in sorted(files)]
        plan["questions"] = hashlib.sha256("".join([*self.items, *digests]).encode()).hexdigest()[:16]
        make_folder(out)
        told = json.dumps(plan, indent=1)
        if (out / PLAN).exists() and (out / PLAN).read_text(errors="replace", encoding="utf-8") != told:
            raise InputError(
                f"{out} holds answers to another study, or its pictures have changed since: give another --out, or the "
                "same results and settings"
            )
        write_text(out / PLAN, told)
        self.lock = threading.Lock()
        self.answers: dict[tuple[str, str], dict[str, Any]] = {}
        text = (out / ANSWERS).read_text(encoding="utf-8", errors="replace") if (out / ANSWERS).exists() else ""
        if text and not text.endswith("\n"):  # torn by a crash: the next answer must not continue that line
            with (out / ANSWERS).open("a", encoding="utf-8") as stream:
                stream.write("\n")
        for line in text.splitlines():
            try:
                answer = parse_json(line)
                check_kinds(answer, FIELDS, "an answer")
            except ValueError:
                continue
            if answer["id"] in self.items:
                self.answers[answer["rater"], answer["id"]] = answer

    def order(self, rater: str) -> list[str]:
        """The questions in this rater's own order."""
        ids = list(self.items)
        random.Random(f"{self.seed} {rater}").shuffle(ids)
        return ids

    def sides(self, rater: str, item: Item) -> tuple[Path, Path]:
        """Left and right."""
        swapped = random.Random(f"{self.seed} {rater} {item.id}").random() < 0.5
        return (item.pictures[1], item.pictures[0]) if swapped else item.pictures

    def next(self, rater: str) -> dict[str, Any]:
        todo = [one for one in self.order(rater) if (rater, one) not in self.answers]
        told: dict[str, Any] = {"id": "", "total": len(self.items), "done": len(self.items) - len(todo)}
        if todo:
            item = self.items[todo[0]]
            left, right = (self.tokens[path] for path in self.sides(rater, item))
            told |= {"id": item.id, "question": ASKED[item.question], "left": left, "right": right}
            told["text"] = item.text if item.question == "prompt" else ""
            told["references"] = [self.tokens[path] for path in item.references]
        return told

    def answer(self, rater: str, item_id: str, choice: str) -> None:
        """Append an answer to the file; a second one to the same question (a double click) does not count.

        Raises:
            KeyError: no such question.
        """
        item = self.items[item_id]
        if choice not in ("left", "right") or not rater.strip() or len(rater) > 60:
            raise KeyError(choice)
        chosen = self.sides(rater, item)[choice == "right"]
        line = {
            "rater": rater,
            "id": item.id,
            "place": item.place,
            "question": item.question,
            "subject": item.subject,
            "check": item.check,
            "side": choice,
            "first": chosen == item.pictures[0],  # the first result's image, or the right one of a check
        }
        with self.lock:
            if (rater, item.id) in self.answers:
                return
            with (self.out / ANSWERS).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            self.answers[rater, item.id] = line

    def found(self) -> dict[str, Any]:
        """Win rates of the first result by question: mean, interval (subjects drawn again), answers; and the raters."""
        checks: dict[str, list[bool]] = defaultdict(list)
        for answer in self.answers.values():
            checks[answer["rater"]] += [answer["first"]] if answer["check"] else []
        inattentive = {rater for rater, right in checks.items() if right and sum(right) < ATTENTIVE * len(right)}
        rates: dict[str, dict[str, float]] = {}
        for question in ASKED:
            by_subject: dict[str, list[bool]] = defaultdict(list)
            for answer in self.answers.values():
                if answer["question"] == question and not answer["check"] and answer["rater"] not in inattentive:
                    by_subject[answer["subject"]].append(answer["first"])
            if by_subject:
                counts = [len(of) for of in by_subject.values()]
                shares = [sum(of) / len(of) for of in by_subject.values()]
                mean = sum(share * count for share, count in zip(shares, counts, strict=True)) / sum(counts)
                low, high = rate_interval(shares, counts)
                rates[question] = {"mean": mean, "low": low, "high": high, "answers": sum(counts)}
        return {"rates": rates, "raters": len(checks), "left_out": sorted(inattentive)}

    def write_found(self) -> str:
        """The win rates as a Markdown table, also written to study.md."""
        found = self.found()
        lines = [
            f"| {plain(self.names[0])} preferred to {plain(self.names[1])} | win rate | 95 % interval | answers |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {question} | {one['mean']:.1%} | {one['low']:.1%} to {one['high']:.1%} | {one['answers']:.0f} |"
            for question, one in found["rates"].items()
        ]
        lines += [
            "",
            f"{found['raters']} raters, of whom {len(found['left_out'])} failed the attention checks and are left out.",
        ]
        text = "\n".join(lines)
        (self.out / FOUND).write_text(text + "\n", encoding="utf-8")
        return text


def questions(first: Result, second: Result, pairs: int, seed: int) -> list[Item]:
    """Two questions for each of `pairs` places that both results have, and the attention checks between them."""
    theirs = {place_of(image): image for image in second.images}
    by_subject: dict[str, list[tuple[dict, dict]]] = defaultdict(list)
    for image in first.images:
        if place_of(image) in theirs:
            by_subject[image["subject"]].append((image, theirs[place_of(image)]))
    if not by_subject:
        raise InputError(f"{first.name} and {second.name} have no image of the same subject, prompt and seed")
    rng = random.Random(seed)
    for of in by_subject.values():
        rng.shuffle(of)
    # In turn: the first of each subject, then the second of each, ...
    longest = max(len(of) for of in by_subject.values())
    chosen = [of[turn] for turn in range(longest) for of in by_subject.values() if turn < len(of)][:pairs]
    photographs = {name: [Path(one["file"]) for one in of] for name, of in first.photographs.items()}
    items = []
    for image, other in chosen:
        subject, place = image["subject"], "/".join(str(one) for one in place_of(image))
        pictures = (Path(first.images_folder) / image["file"], Path(second.images_folder) / other["file"])
        for question in ASKED:
            references = tuple(photographs[subject][:3]) if question == "subject" else ()
            own = f"{question} {place}"
            items.append(Item(item_id(own, seed), own, question, subject, image["prompt"], references, pictures))
    items += checks_for(photographs, len(items) // CHECK_EVERY, rng, seed)
    return items


def checks_for(photographs: Mapping[str, Sequence[Path]], count: int, rng: random.Random, seed: int) -> list[Item]:
    """Questions with a known answer: another photograph of the subject against one of another subject."""
    able = [name for name, paths in photographs.items() if len(paths) > 1]
    if not able or len(photographs) < 2:
        return []
    items = []
    for number in range(max(1, count)):
        subject = able[number % len(able)]
        stranger = rng.choice([name for name in photographs if name != subject])
        pictures = (photographs[subject][-1], rng.choice(photographs[stranger]))
        items.append(
            Item(
                item_id(f"check {number}", seed),
                f"check {number}",
                "subject",
                subject,
                "",
                tuple(photographs[subject][:1]),
                pictures,
                check=True,
            )
        )
    return items


def item_id(place: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {place}".encode()).hexdigest()[:16]


def as_png(path: Path) -> bytes:
    """The pixels alone: a file's format or metadata could tell whose it is."""
    found = io.BytesIO()
    load_image(path).convert("RGB").save(found, "PNG")
    return found.getvalue()


def handler_of(asking: Study) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            address = urlparse(self.path)
            if address.path == "/":
                self.reply(PAGE.read_bytes(), "text/html; charset=utf-8")
            elif address.path == "/next":
                rater = parse_qs(address.query).get("rater", [""])[0]
                self.reply(json.dumps(asking.next(rater)).encode(), "application/json")
            elif path := asking.paths.get(address.path.removeprefix("/picture/")):
                self.reply(as_png(path), "image/png")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            try:
                length = min(int(self.headers.get("Content-Length", 0)), 10_000)
                told = json.loads(self.rfile.read(length))
                asking.answer(str(told["rater"]), str(told["id"]), str(told["choice"]))
            except (ValueError, KeyError, TypeError):
                self.send_error(HTTPStatus.BAD_REQUEST, "no such question or choice")
                return
            except OSError as error:  # a full disk: the page says so and keeps the question
                self.send_error(HTTPStatus.INSUFFICIENT_STORAGE, str(error))
                return
            self.reply(b"{}", "application/json")

        def reply(self, content: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the answers are the log."""

    return Handler
