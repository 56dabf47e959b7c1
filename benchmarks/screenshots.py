"""Pictures of the explorer in a headless browser, with small models that are trained for them: `python -m benchmarks.screenshots`.

They go where the documentation shows them. Models are kept in the folder of `--models`, so a second call takes seconds.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import bnnp
from bnnp.data.collection import Collection, Column
from bnnp.data.images import images_to_tasks, load_digits, split_images
from bnnp.explorer import Explorer, Server
from bnnp.runs import Run

__all__ = ["BROWSER_FLAGS", "find_browser", "main", "map_model", "pixels", "waves"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, PHONE = {"width": 1200, "height": 860}, {"width": 375, "height": 812}


def find_browser() -> str | None:
    """Return the path of a Chromium on this machine, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _trained(folder: Path, model: bnnp.BNNP, tasks: Any, steps: int) -> bnnp.BNNP:
    if (folder / "model.json").is_file():
        return bnnp.load(folder)
    print(f"Training for {folder.name}, {steps} steps", file=sys.stderr)
    bnnp.meta_train(model, tasks, steps=steps, learning_rate=1e-2, batch_size=10, num_samples=2)
    model.save(folder)
    return model


def _wave(rng: np.random.Generator) -> tuple[Any, Any]:
    x = np.sort(rng.uniform(0, 12, size=(40, 1)), axis=0)
    level = 20 + rng.normal(0, 1) + rng.uniform(2, 6) * np.sin(rng.uniform(0.8, 1.2) * x + rng.uniform(0, 6.3))
    return x, level + rng.normal(0, 0.5, size=x.shape)


def waves(folder: Path, steps: int = 600) -> tuple[Run, Collection]:
    """Return a model of one input, temperature over hours, and tasks that it was not trained on."""
    rng = np.random.default_rng(0)
    prior = bnnp.Prior("shared", spread=0.9, input_scale=3.0)
    model = bnnp.BNNP(1, 1, hidden=(64, 64), prior=prior, activation="tanh", shared_noise=True)
    model = _trained(folder / "waves", model, [_wave(rng) for _ in range(400)], steps)
    columns = {"inputs": [Column("time", "h")], "outputs": [Column("temperature", "°C")]}
    names = [f"station {i + 1:02d}, day {j + 1}" for i in range(12) for j in range(5)]
    return Run.of(model, **columns), Collection.of([_wave(rng) for _ in names], **columns, names=names)


def pixels(folder: Path, steps: int = 500) -> tuple[Run, Collection]:
    """Return a model of images, trained on handwritten digits, and digits that it was not trained on."""
    digits, split = load_digits(), split_images(1797)
    model = bnnp.BNNP(
        2, 1, hidden=(64, 64), prior=bnnp.Prior("shared", spread=0.8, input_scale=4.0), activation="sine", shared_noise=True,
        likelihood=bnnp.Gaussian(noise_std=0.3),
    )  # fmt: skip
    model = _trained(folder / "pixels", model, images_to_tasks(digits.images[split.train]), steps)
    columns = {"inputs": [Column("row"), Column("column")], "outputs": [Column("grey value")]}
    tasks = [(x.numpy(), y.numpy()) for x, y in images_to_tasks(digits.images[split.test[:200]], torch.float64)]
    names = [f"digit {digits.labels[i]}, image {i}" for i in split.test[:200]]
    recipe = {"kind": "images", "shape": [8, 8]}
    return Run.of(model, **columns, recipe=recipe), Collection.of(tasks, **columns, names=names, recipe=recipe)


def _field(rng: np.random.Generator, x: Any) -> Any:
    lat, lon = (x[:, 0] - 50) / 8, (x[:, 1] - 10) / 12
    wave = np.sin(2.2 * lon + rng.uniform(0, 6.3)) * np.cos(1.8 * lat + rng.uniform(0, 6.3))
    return 283 - 5 * lat + rng.normal(0, 2) + rng.uniform(1, 4) * wave + rng.normal(0, 0.3, size=len(x))


def map_model(folder: Path, steps: int = 500) -> tuple[Run, Collection]:
    """Return a model of maps, temperature over latitude and longitude, and maps that it was not trained on."""
    rng = np.random.default_rng(1)
    lattice = np.stack([part.ravel() for part in np.meshgrid(np.linspace(58, 42, 20), np.linspace(-2, 22, 28), indexing="ij")], axis=-1)
    prior = bnnp.Prior("shared", spread=0.9, input_scale=2.0)
    model = bnnp.BNNP(2, 1, hidden=(64, 64), prior=prior, activation="tanh", shared_noise=True)
    tasks = [(x, _field(rng, x)) for x in (lattice[rng.permutation(len(lattice))[:80]] for _ in range(300))]
    model = _trained(folder / "map", model, tasks, steps)
    columns = {"inputs": [Column("latitude", "°"), Column("longitude", "°")], "outputs": [Column("temperature", "K")]}
    held = [(lattice, _field(rng, lattice)) for _ in range(24)]
    names = [f"2024-03-01 {hour:02d}:00" for hour in range(24)]
    recipe = {"kind": "grid"}
    return Run.of(model, **columns, recipe=recipe), Collection.of(held, **columns, names=names, recipe=recipe)


class Camera:
    """Open pages of one explorer and save what they show."""

    def __init__(self, browser: Any, url: str, out: Path) -> None:
        self.browser, self.url, self.out = browser, url, out

    def page(self, size: dict[str, int] = WIDE, scheme: str = "light") -> Any:
        """Return a fresh page of this size and colour scheme."""
        page = self.browser.new_page(viewport=size, color_scheme=scheme)
        page.goto(self.url)
        page.wait_for_selector("#numbers dt")
        return page

    def shoot(self, page: Any, name: str, whole: bool = False) -> None:
        """Save what a page shows once it is at rest."""
        settle(page)
        path = self.out / f"explorer-{name}.png"
        Image.open(io.BytesIO(page.screenshot(full_page=whole))).convert("RGB").save(path, optimize=True)
        print(path)


def settle(page: Any) -> None:
    """Wait until the trust sentence is that of the points as they are."""
    page.wait_for_timeout(450)
    page.wait_for_selector("#trust:not(.stale)", timeout=60000)


def click_at(page: Any, x: float, y: float) -> None:
    """Click into the plot, in parts of its width and height."""
    box = page.locator("#plot").bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])


def load_task(page: Any, search: str, share: str) -> None:
    """Load the first task whose name holds a text."""
    page.fill("#search", search)
    page.wait_for_timeout(400)
    page.select_option("#share", share)
    page.click("#load")
    page.wait_for_timeout(400)


def stroke(page: Any, way: list[tuple[float, float]]) -> None:
    """Paint along a way on the first panel, in parts of its width and height."""
    box = page.locator("canvas.live").bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in way]
    page.mouse.move(*at[0])
    page.mouse.down()
    for x, y in at[1:]:
        page.mouse.move(x, y, steps=6)
    page.mouse.up()


def of_curves(camera: Camera) -> None:
    """Take the pictures of a model of one input."""
    for name, size, scheme in (("curve", WIDE, "light"), ("curve-dark", WIDE, "dark"), ("curve-phone", PHONE, "light")):
        page = camera.page(size, scheme)
        for x, y in ((0.2, 0.3), (0.32, 0.52), (0.42, 0.72), (0.7, 0.35)):
            click_at(page, x, y)
        camera.shoot(page, name, whole=size is PHONE)
        page.close()
    page = camera.page()
    for x, y in ((0.25, 0.35), (0.5, 0.5), (0.75, 0.4)):
        click_at(page, x, y)
    settle(page)
    box = page.locator("#plot").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + 0.7 * box["height"], steps=8)
    camera.shoot(page, "drag")
    page.mouse.up()
    load_task(page, "station 03", "0.25")
    settle(page)
    page.click("#clear")
    many = [[12 * i / 999] for i in range(1000)]
    values = [[20 + 4 * float(np.sin(x[0])) + 0.5 * float(np.cos(37 * i))] for i, x in enumerate(many)]
    page.evaluate(
        "async ([x, y]) => fetch('api/change', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
        "body: JSON.stringify({page: new URL(location.href).searchParams.get('page'), do: 'paint', x, y})})",
        [many, values],
    )
    page.reload()
    page.wait_for_selector("#numbers dt")
    camera.shoot(page, "1000-points")
    page.close()


def of_images(camera: Camera) -> None:
    """Take the pictures of a model of images."""
    way = [(0.3, 0.2), (0.7, 0.2), (0.65, 0.5)]
    for name, size, scheme in (("image", WIDE, "light"), ("image-dark", WIDE, "dark"), ("image-phone", PHONE, "light")):
        page = camera.page(size, scheme)
        load_task(page, "digit 3", "0.025")
        page.locator("canvas.live").scroll_into_view_if_needed()
        page.select_option("#brush", "0")
        stroke(page, way)
        page.mouse.move(2, 2)
        camera.shoot(page, name, whole=size is PHONE)
        page.close()


def of_maps(camera: Camera) -> None:
    """Take the pictures of a model of maps."""
    for name, size in (("map", WIDE), ("map-phone", PHONE)):
        page = camera.page(size)
        load_task(page, "12:00", "0.1")
        camera.shoot(page, name, whole=size is PHONE)
        page.close()


def main(arguments: list[str] | None = None) -> int:
    """Make all pictures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", nargs="?", type=Path, default=Path("docs/pictures"), help="folder of the pictures")
    parser.add_argument("--models", type=Path, default=Path("runs/screenshots"), help="folder in which trained models are kept")
    parser.add_argument("--only", choices=["curves", "images", "maps"], help="a part of them")
    options = parser.parse_args(arguments)
    path = find_browser()
    if path is None:
        print(f"Expected a browser, one of {', '.join(BROWSERS)}. Got none. Install chromium.", file=sys.stderr)
        return 1
    from playwright.sync_api import sync_playwright

    options.out.mkdir(parents=True, exist_ok=True)
    sets = {"curves": (waves, of_curves), "images": (pixels, of_images), "maps": (map_model, of_maps)}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        for name, (make, take) in sets.items():
            if options.only in (None, name):
                run, data = make(options.models)
                with Server(Explorer(run, data)) as server:
                    take(Camera(browser, server.url, options.out))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
