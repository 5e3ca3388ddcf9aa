"""The pictures in docs/images: the dashboard of a real server, on the default base with the adapters of ./adapters, under some traffic.

    python -m tests.screenshots                  make all of them anew; about three minutes
    python -m tests.screenshots --seconds 20     with less history in the lines

Needs Chromium, and is prettier with the Inter typeface (Debian: fonts-inter); every run's numbers are its own.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from browser import Visit, chromium, visit
from servers import Running, running_command

from moa_serve.train.data import Example
from moa_serve.train.prompts import prompt_text

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
NAMES = ("Tom", "Jan", "Mia", "Ben", "Lea", "Sam", "Ida", "Max")
THINGS = ("apples", "pens", "stamps", "marbles", "books", "shells", "cards", "coins")
QUESTIONS = (
    "{name} had {a} {thing} and gave away {b} of them . How many {thing} are left ?",
    "{name} has {b} boxes with {a} {thing} each . How many {thing} are there ?",
    "{name} found {a} {thing} on Monday and {b} on Tuesday . How many {thing} are there in all ?",
    "There are {a} {thing} for {b} children . How many {thing} does each child get ?",
)
SCIENCE = ("What do plants need to make their food ?", "Why does ice float on water ?", "Which planet is closest to the sun ?")
MODELS = ("math-soft", "math-sparse", "science-lora", "SmolLM2-135M-Instruct")
SHARES = (4, 5, 2, 1)


def question(rng: random.Random, model: str) -> str:
    if model.startswith("math"):
        text = rng.choice(QUESTIONS).format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=rng.randrange(6, 60), b=rng.randrange(2, 6))
    else:
        text = rng.choice(SCIENCE)
    return prompt_text(Example("text", text))


@contextmanager
def traffic(url: str, clients: int = 5) -> Iterator[threading.Event]:
    """Clients that ask one question after the other, now fewer of them and now more, until the block ends or the event is set."""
    is_over = threading.Event()

    def client(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=url, timeout=60) as http:
            while not is_over.is_set():
                if (time.monotonic() / 17 + number / clients) % 1 < 0.3:
                    is_over.wait(0.5)
                    continue
                model = rng.choices(MODELS, SHARES)[0]
                body = {"model": model, "prompt": question(rng, model), "max_tokens": rng.randrange(16, 64), "temperature": 0.7}
                with suppress(httpx.HTTPError):
                    http.post("/v1/completions", json=body)
                is_over.wait(rng.random() * 0.4)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield is_over
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def shoot(found: Visit, name: str, *, width: int) -> None:
    """The whole page as one screen, so that nothing that sticks to an edge stands in the middle."""
    page, path = found.page, IMAGES / f"{name}.png"
    height = page.evaluate("document.querySelector('header').offsetHeight + document.querySelector('main').offsetHeight")
    page.set_viewport_size({"width": width, "height": max(600, height)})
    page.wait_for_timeout(200)
    page.screenshot(path=path, caret="initial")
    with Image.open(path) as image:
        image.convert("RGB").save(path, optimize=True)
    sys.stdout.write(f"{path.relative_to(ROOT)} {path.stat().st_size // 1024} KiB\n")


def show_live(found: Visit) -> None:
    found.page.goto(f"{found.url}/dashboard")
    found.page.locator("#adapters tr").first.wait_for()


def show_experts(found: Visit, adapter: str, measure: str) -> None:
    page = found.page
    page.goto(f"{found.url}/dashboard#experts/{adapter}")
    page.locator("#experts-map td[data-at]").first.wait_for()
    page.wait_for_timeout(2500)
    page.locator(f"#experts-measure input[value={measure}]").check(force=True)
    page.locator('#experts-map td[data-at="4 20"]').hover()


def show_playground(found: Visit, expert: str) -> None:
    page = found.page
    page.goto(f"{found.url}/dashboard#playground")
    page.locator("#model-0 option").first.wait_for(state="attached")
    page.locator("#model-0").select_option("math-soft")
    page.locator("#model-1").select_option("math-sparse")
    page.locator("#run").click()
    for place in (0, 1):
        page.locator(".pane-state").nth(place).get_by_text("ended").wait_for()
    page.locator("#colour-expert").select_option(expert)
    tokens = page.locator(".pane").nth(1).locator(".token")
    tokens.nth(min(9, tokens.count() - 1)).click()
    page.mouse.move(0, 0)


def take(server: Running, seconds: float) -> None:
    """Every view on a desktop in both themes, and on a phone in one of them: two pages, for each takes of the server's time."""
    phone = {"width": 390, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    with (
        chromium() as browser,
        traffic(server.url) as is_over,
        visit(browser, server.url) as desk,
        visit(browser, server.url, **phone) as hand,
    ):
        desk.page.wait_for_timeout(12_000)  # the first requests also load adapters, which is another picture
        show_live(desk)
        show_live(hand)
        desk.page.wait_for_timeout(seconds * 1000)
        shoot_both(desk, "live")
        shoot(hand, "dashboard-live-phone", width=390)
        show_experts(desk, "math-sparse", "selected")
        shoot_both(desk, "experts")
        show_experts(desk, "math-soft", "difference")
        shoot(desk, "dashboard-difference-desktop", width=1280)
        hand.page.emulate_media(color_scheme="dark")
        show_experts(hand, "math-sparse", "selected")
        shoot(hand, "dashboard-experts-phone-dark", width=390)
        is_over.set()
        show_playground(desk, "expert P_ADAPTER")
        shoot_both(desk, "playground")
        hand.page.emulate_media(color_scheme="light")
        show_playground(hand, "expert P_ADAPTER")
        shoot(hand, "dashboard-playground-phone", width=390)
        for found in (desk, hand):
            found.check()


def shoot_both(desk: Visit, view: str) -> None:
    shoot(desk, f"dashboard-{view}-desktop", width=1280)
    desk.page.emulate_media(color_scheme="dark")
    shoot(desk, f"dashboard-{view}-dark", width=1280)
    desk.page.emulate_media(color_scheme="light")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of docs/images.")
    parser.add_argument("--seconds", type=float, default=120.0, help="of traffic before the first picture")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "moa_serve", "serve", "--port", "0", "--adapters-dir", str(ROOT / "adapters"), "--device", "cpu"]
    with tempfile.TemporaryDirectory() as folder, running_command(command, Path(folder)) as server:
        take(server, options.seconds)


if __name__ == "__main__":
    main()
