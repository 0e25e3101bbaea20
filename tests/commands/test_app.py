"""The page in a real browser (Debian's Chromium, driven by Playwright): `make test-app`."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pig.toyworld import scene

sync_api = pytest.importorskip("playwright.sync_api", reason="make test-app installs it")
pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SHOTS = Path("runs/app")
TIMEOUT = 120_000  # milliseconds


@contextlib.contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "pig.cli", "app", "--port", str(port), *arguments]
    server = subprocess.Popen(command, env={**os.environ, **environment})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, "the server ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=5).read()
                break
            time.sleep(0.5)
        else:
            raise AssertionError("the server does not answer")
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def address(examples) -> Iterator[str]:
    with serving("--out", str(examples.parent)) as found:
        yield found


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page") / "app/examples"


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM is not None, "no Chromium: apt-get install chromium"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    yield page
    page.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "mug.png"
    drawing = scene.draw(scene.make_subject(scene.HELD_OUT_SEED + 6, category="mug"), "beach", 1, 64)
    Image.fromarray(drawing.image).save(path)
    return path


def give(page, *files: Path) -> None:
    page.locator("input[type=file]").first.set_input_files([str(file) for file in files])


def set_number(page, label: str, value: object) -> None:
    field = page.get_by_label(re.compile(label)).first
    field.fill(str(value))
    field.press("Tab")


def said(page, words: str) -> None:
    page.get_by_text(re.compile(words)).first.wait_for()


def draw(page, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Draw", exact=True).click()


def choose(page, model: str) -> None:
    page.locator("#model input").click()
    page.get_by_role("option", name=model, exact=True).click()


def images(page):
    return page.locator("#images img")


def code(page) -> str:
    """The command line that the page shows, as a shell reads it."""
    return page.locator("#command .cm-content").inner_text()


def redrawn(command: str, folder: Path) -> list[np.ndarray]:
    """Run the page's command line in a folder; the pictures that it has drawn there."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], cwd=folder, check=True, timeout=300, env={**os.environ, "PATH": path})
    found = sorted((folder / "runs/drawn/references").rglob("*.png"))
    return [np.asarray(Image.open(path).convert("RGB")).astype(int) for path in found]


def on_page(page) -> list[np.ndarray]:
    """The pictures of the page, as its server sends them."""
    addresses = [image.get_attribute("src") for image in images(page).all()]
    sent = [page.request.get(address).body() for address in addresses]
    return [np.asarray(Image.open(io.BytesIO(one)).convert("RGB")).astype(int) for one in sent]


def test_an_example_is_drawn_and_its_command_line_draws_the_same(page, examples) -> None:
    page.locator("#examples button img").nth(6).click()
    page.locator("#cutouts img").nth(2).wait_for()
    assert page.get_by_label("What they show").input_value() == "mug"
    page.screenshot(path=SHOTS / "example.png")
    set_number(page, "number input for Images", 2)
    set_number(page, "Seed of the first", 7)
    page.get_by_role("button", name="Controls").click()
    set_number(page, "number input for Image guidance", 3)
    page.get_by_role("button", name="Draw", exact=True).click()
    images(page).nth(1).wait_for()
    said(page, "seed 7")
    said(page, "seed 8")
    page.screenshot(path=SHOTS / "drawn.png")
    command = code(page)
    assert f"--references {examples}/mug_006_0.png" in command
    assert "--image_guidance 3" in command
    for mine, theirs in zip(on_page(page), redrawn(command, examples.parent.parent), strict=True):
        assert np.abs(mine - theirs).max() <= 1  # images drawn together differ by rounding


def test_models_bring_their_own_controls(page) -> None:
    page.get_by_role("button", name="Controls").click()
    page.get_by_label(re.compile("number input for Image guidance")).first.wait_for()
    choose(page, "toyworld/ip_adapter")
    page.get_by_label(re.compile("number input for Scale")).first.wait_for(state="attached")
    page.get_by_role("button", name="Controls").click()
    page.get_by_label(re.compile("number input for Scale")).first.wait_for()
    choose(page, "base:toyworld")
    page.get_by_text("Cut out by").first.wait_for(state="hidden")
    set_number(page, "number input for Images", 1)
    draw(page, "a photo of a mug, on a beach")
    images(page).first.wait_for()
    assert "--model base:toyworld" in code(page)
    assert "--references" not in code(page)


def test_a_phone(browser, address) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(TIMEOUT)
    page.goto(address)
    page.locator("#examples button img").first.click()
    page.locator("#cutouts img").nth(2).wait_for()
    set_number(page, "number input for Images", 1)
    page.get_by_role("button", name="Draw", exact=True).click()
    images(page).first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=SHOTS / "phone.png", full_page=True)
    page.close()


def test_cancel(page, photo) -> None:
    give(page, photo)
    page.locator("#cutouts img").first.wait_for()
    page.get_by_role("button", name="Controls").click()
    set_number(page, "number input for Num inference steps", 100)
    draw(page, "a photo of a mug, in space")
    said(page, "step .* of 100")
    page.get_by_role("button", name="Cancel").click()
    said(page, "cancelled")
    assert images(page).count() == 0


def test_what_users_get_wrong_is_said_and_the_page_lives_on(page, photo, tmp_path) -> None:
    draw(page, "a photo of a mug")
    said(page, "no references: drop pictures")
    torn = tmp_path / "torn.png"
    torn.write_bytes(photo.read_bytes()[:300])
    give(page, torn)
    said(page, "cannot read image torn.png")
    page.reload()
    huge = tmp_path / "huge.png"
    Image.new("1", (10_000, 9_000)).save(huge)
    give(page, huge)
    said(page, "more than 80 megapixels")
    page.reload()
    blank = tmp_path / "blank.png"
    Image.new("RGB", (64, 64), (90, 140, 200)).save(blank)
    give(page, blank)
    said(page, "sam finds no object")
    page.reload()
    large = tmp_path / "large.bmp"
    Image.fromarray(np.zeros((3000, 3000, 3), np.uint8)).save(large)
    assert large.stat().st_size > 20e6
    give(page, large)
    said(page, "[Ee]xceed|too large|[Mm]aximum")
    page.reload()
    give(page, photo)
    page.locator("#cutouts img").first.wait_for()
    draw(page, " ")
    said(page, "an empty prompt")
    set_number(page, "number input for Images", 1)
    page.get_by_role("button", name="Controls").click()
    set_number(page, "number input for Num inference steps", 2)
    draw(page, "a photo of a mug")
    images(page).first.wait_for()


def test_inpainting_by_painting(page, photo, tmp_path) -> None:
    give(page, photo)
    page.locator("#cutouts img").first.wait_for()
    set_number(page, "number input for Images", 1)
    page.get_by_role("button", name="Draw into a picture").click()
    host = tmp_path / "host.png"
    drawing = scene.draw(scene.make_subject(scene.HELD_OUT_SEED + 18, category="mug"), "beach", 3, 64)
    Image.fromarray(drawing.image).resize((128, 128)).save(host)
    canvas, brush = page.locator("#painting canvas").first, page.locator("#painting").get_by_label("Brush", exact=True)
    page.locator("#picture input[type=file]").set_input_files(str(host))
    said(page, "64x64 pixels, nothing is painted over yet")
    draw(page, "a photo of a mug, on a beach")
    said(page, "black all over")  # nothing is painted yet
    brush.click()
    page.wait_for_timeout(2000)  # the editor fits its picture into the frame
    box = canvas.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(middle[0] - 30, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 30, middle[1], steps=8)
    page.mouse.up()
    said(page, "% to be drawn anew")
    draw(page, "a photo of a mug, on a beach")
    images(page).first.wait_for()
    page.screenshot(path=SHOTS / "inpainting.png")


def test_ezigen_shows_its_loops(browser, photo) -> None:
    with serving("--model", "toyworld/ezigen") as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(TIMEOUT)
        page.goto(address)
        give(page, photo)
        page.locator("#cutouts img").first.wait_for()
        set_number(page, "number input for Images", 1)
        page.get_by_role("button", name="Controls").click()
        set_number(page, "number input for Num inference steps", 5)
        page.locator("label", has_text="How often the picture is noised again").locator("textarea").fill("2")
        page.get_by_role("button", name="Loop by loop").click()
        draw(page, "a photo of a mug, in space")
        images(page).first.wait_for()
        page.locator("#loops img").nth(2).wait_for()
        said(page, "seed 0, before the loops")
        said(page, "seed 0, after loop 2")
        assert "--loops 2" in code(page)
        assert "renoise" not in code(page)  # an empty field is the method's own choice, not 0
        page.screenshot(path=SHOTS / "loops.png")
        page.close()


def test_another_address_asks_for_a_password(browser) -> None:
    command = [sys.executable, "-m", "pig.cli", "app", "--host", "0.0.0.0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 2
    assert "Set PIG_APP_PASSWORD" in ended.stderr
    with serving("--host", "0.0.0.0", PIG_APP_PASSWORD="correct horse") as address:
        for password, answer in (("wrong", "Incorrect"), ("correct horse", "Draw your subject")):
            page = browser.new_page()
            page.goto(address)
            page.get_by_label("username").fill("pig")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            page.get_by_text(answer).first.wait_for()
            page.close()
