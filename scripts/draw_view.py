# SPDX-License-Identifier: Apache-2.0
"""Draw the README's pictures of the view, from the page of `adatoken3d demo`, in a real browser as people use it.

python scripts/draw_view.py [--out docs/images] [--address URL]

It asks, clicks on a point, selects tokens and asks again, compares two strategies, plays the layers and saves a report;
it ends with an error where one of these does not show what it should. It needs Chromium and playwright.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).resolve().parents[1] / "docs" / "images"
# WebGL is drawn by the CPU; as root, Chromium has no sandbox.
FLAGS = ("--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
SIZE = {"width": 1280, "height": 720}
TIMEOUT = 120_000  # milliseconds
QUESTION, BUDGET_MS = "What is the colour of the bed?", 4000
MIDDLE = 5  # layer that is shown
MOST_BYTES = 300_000
CLICKS = ((430, 330), (520, 380), (380, 420), (600, 330), (300, 380), (480, 460))  # one of them hits a token


@contextmanager
def demo() -> Iterator[str]:
    """The demo with its page; yields the address that it prints."""
    command = [str(Path(sys.executable).with_name("adatoken3d")), "demo", "--view", "--port", "0", "--views", "12"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"The page stays until Ctrl-C: (\S+)", line):
                    yield found[1]
                    return
            raise SystemExit("the demo printed no address")
        finally:
            process.terminate()


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def told(page: Page, place: str, *texts: str) -> str:
    """What stands in a part of the page once all of these texts are there."""
    part = page.locator(f"#adatoken3d-{place}:visible")
    for text in texts:
        part = part.filter(has_text=text)
    part.first.wait_for(timeout=TIMEOUT)
    return part.first.inner_text()


def ask(page: Page, question: str) -> str:
    tab(page, "Ask")
    page.locator("form input").first.fill(question)
    press(page, "Ask")
    return told(page, "answer", question, " ms:")


def save(page: Page, path: Path) -> None:
    """A screenshot with few colours: it is looked at small."""
    page.wait_for_timeout(1500)  # until everything that was told is drawn
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB", flush=True)


def number(page: Page, value: int) -> None:
    """Types into the field beside the slider that is in sight."""
    field = page.locator("input[inputmode=numeric], input[inputmode=decimal]").filter(visible=True).first
    field.fill(str(value))
    field.press("Enter")


def draw(page: Page, out: Path) -> None:
    """Goes through all of the page."""
    # Of what drawing takes without a GPU nobody needs to read.
    note = page.locator("[role=alert] button")
    if note.count():
        note.first.click()
    tab(page, "Ask")
    number(page, BUDGET_MS)
    print(ask(page, QUESTION))
    told(page, "answer", f"budget {BUDGET_MS} ms")
    save(page, out / "view_answer.png")
    number(page, 0)
    print(ask(page, "How many chairs are there?"), ask(page, QUESTION))

    tab(page, "Tokens")
    page.keyboard.down("Shift")
    page.mouse.move(330, 380)
    page.mouse.down()
    page.mouse.move(560, 520, steps=5)
    page.mouse.move(640, 560, steps=5)
    page.mouse.up()
    page.keyboard.up("Shift")
    page.locator("#adatoken3d-chosen").filter(has_not_text="0 tokens").wait_for(timeout=TIMEOUT)
    press(page, "Ask again with only them")
    print(told(page, "pair", "with only", "probability of"))
    press(page, "Ask again without them")
    print(told(page, "pair", "without", "probability of"))
    save(page, out / "view_selected.png")

    first = page.screenshot()
    press(page, "Play layer by layer")
    page.wait_for_timeout(3000)
    if page.screenshot() == first:
        raise SystemExit("nothing moved when the layers were played")
    press(page, "Select nothing")
    page.locator("input[aria-haspopup=listbox]").filter(visible=True).first.click()
    page.get_by_role("option", name="answer: picture", exact=True).click()
    number(page, MIDDLE)
    save(page, out / "view_layers.png")

    tab(page, "Ask")
    for x, y in CLICKS:
        page.mouse.click(x, y)
        page.wait_for_timeout(3000)
        if "What is the object at" in told(page, "answer"):
            break
    else:
        raise SystemExit("no click hit a token")
    print(told(page, "answer", "What is the object at"))
    with page.expect_download(timeout=TIMEOUT) as saved:
        press(page, "Report of this answer")
    print(f"report: {Path(saved.value.path()).stat().st_size / 1e6:.2f} MB")

    page.locator("form input").first.fill(QUESTION)
    tab(page, "Compare")
    press(page, "Compare on the question")
    print(told(page, "pair", QUESTION, "prefill FLOPs"))
    tab(page, "History")
    print(page.locator("table").filter(visible=True).first.inner_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    parser.add_argument("--address", metavar="URL", help="of a page that is there already")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise SystemExit("no browser: install chromium")

    def drive(address: str) -> None:
        problems: list[Any] = []
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=program, args=list(FLAGS))
            page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
            page.on("pageerror", lambda error: problems.append(error))
            page.goto(address)
            page.get_by_role("button", name="Ask", exact=True).wait_for(timeout=TIMEOUT)
            page.wait_for_timeout(4000)
            draw(page, args.out)
            browser.close()
        if problems:
            raise SystemExit(f"errors of the page: {problems}")

    if args.address:
        drive(args.address)
    else:
        with demo() as address:
            drive(address)


if __name__ == "__main__":
    main()
