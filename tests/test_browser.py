"""The explorer in a real browser: what a person does with mouse, finger and keys, and what the page then shows.

Skipped where no Chromium is installed; `.ci/run` installs one.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from benchmarks.screenshots import BROWSER_FLAGS, PHONE, click_at, find_browser, load_task, settle, stroke

import bnnp
from bnnp.data.collection import Collection, Column
from bnnp.data.images import pixel_grid
from bnnp.explorer import Explorer, Server
from bnnp.runs import Run

playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'bnnp[dev]'")
if find_browser() is None:
    pytest.skip("needs a Chromium: apt-get install chromium", allow_module_level=True)

SIZE = {"width": 1100, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=find_browser(), args=BROWSER_FLAGS)
        yield found
        found.close()


def model_of(x_dim: int = 1, **options: Any) -> bnnp.BNNP:
    return bnnp.BNNP(x_dim, 1, **{"hidden": (8,), "prior": "shared", "activation": "tanh", **options})


@pytest.fixture(scope="module")
def curves() -> Iterator[Server]:
    rng = np.random.default_rng(0)
    tasks = [(x, np.sin(x)) for x in (np.sort(rng.uniform(-2, 2, (20, 1)), axis=0) for _ in range(12))]
    columns = {"inputs": [Column("time", "h")], "outputs": [Column("level", "m")]}
    data = Collection.of(tasks, **columns, names=[f"day {i}" for i in range(12)])
    with Server(Explorer(Run.of(model_of(), **columns), data, 16)) as server:
        yield server


@pytest.fixture(scope="module")
def images() -> Iterator[Server]:
    x, rng = pixel_grid(8, 6, torch.float64).numpy(), np.random.default_rng(0)
    recipe = {"kind": "images", "shape": [8, 6]}
    data = Collection.of([(x, rng.uniform(size=(48, 1))) for _ in range(3)], ["row", "column"], ["grey"], recipe=recipe)
    with Server(Explorer(Run.of(model_of(2), ["row", "column"], ["grey"], recipe=recipe), data, 16)) as server:
        yield server


class Watched:
    """Hold a page and everything it asked for or complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": SIZE, "accept_downloads": True, **options})
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.page = self.opened(url)

    def opened(self, url: str) -> Any:
        """Return another page of the same browser."""
        page = self.context.new_page()
        page.on("request", lambda request: self.hosts.add(urlparse(request.url).netloc) if request.url.startswith("http") else None)
        page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#numbers dt")
        return page


@pytest.fixture
def watch(browser: Any) -> Iterator[Any]:
    opened: list[Watched] = []

    def start(url: str, **options: Any) -> Watched:
        opened.append(Watched(browser, url, **options))
        return opened[-1]

    yield start
    for one in opened:
        one.context.close()
        assert all(host.startswith("127.0.0.1:") for host in one.hosts), one.hosts
        assert one.complaints == []


def state_of(page: Any) -> dict[str, Any]:
    """Return what the server holds for a page."""
    found: dict[str, Any] = page.evaluate(
        "async () => (await fetch('api/open', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
        "body: JSON.stringify({page: new URL(location.href).searchParams.get('page')})})).json()"
    )
    return found


def points_of(page: Any) -> list[list[float]]:
    settle(page)
    points = state_of(page)["state"]["points"]
    return [[*x, *y] for x, y in zip(points["x"], points["y"], strict=True)]


def mean_path(page: Any) -> str:
    return str(page.get_attribute("#plot path.mean", "d"))


def centre(page: Any, selector: str) -> tuple[float, float]:
    box = page.locator(selector).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_add_drag_undo_and_remove(curves: Server, watch: Any) -> None:
    page = watch(curves.url).page
    before = mean_path(page)
    click_at(page, 0.4, 0.3)
    click_at(page, 0.7, 0.6)
    assert len(points_of(page)) == 2 and page.locator("#plot .point").count() == 2 and mean_path(page) != before
    (x0, y0), other = points_of(page)
    moved, axis = mean_path(page), page.text_content("#plot .axes")
    x, y = centre(page, "#plot .point:nth-child(1) .dot")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 40, y - 200, steps=8)
    assert page.text_content("#plot .axes") == axis, "the axes jump while a point is dragged"
    page.mouse.up()
    (x1, y1), still = points_of(page)
    assert x1 > x0 and y1 > y0 and still == other and mean_path(page) != moved
    page.click("#undo")
    assert points_of(page) == [[x0, y0], other]
    page.click("#redo")
    assert points_of(page) == [[x1, y1], other]
    page.locator("#plot .point:nth-child(2)").dblclick()
    assert points_of(page) == [[x1, y1]] and page.locator("#plot .point").count() == 1
    posterior = curves.explorer.subject.model.condition([[x1]], [[y1]], num_samples=256)
    assert page.text_content("#trust") == posterior.diagnose().sentence
    page.click("#clear")
    assert points_of(page) == [] and "prior" in page.text_content("#trust")


def test_the_curve_that_is_drawn_is_the_predicted_mean(curves: Server, watch: Any) -> None:
    page = watch(curves.url).page
    click_at(page, 0.3, 0.4)
    points = points_of(page)
    x, y = (torch.tensor([[p[j]] for p in points]) for j in (0, 1))
    answer = state_of(page)["answer"]
    model = curves.explorer.subject.model
    posterior = model.condition(x, y, num_samples=16)
    if answer["updates"]:
        posterior = model.condition(x[:0], y[:0], num_samples=16).update(x, y)
    wanted = posterior.predict(torch.tensor(answer["x"])[:, None]).mean[:, 0].numpy()
    drawn = np.array([[float(v) for v in part.split()] for part in mean_path(page)[1:].split("L")])
    # The point that was clicked says where values are in the picture, at both ends of a straight scale.
    a, b = np.polyfit(wanted, drawn[:, 1], 1)
    assert a < 0 and np.abs(a * wanted + b - drawn[:, 1]).max() < 0.2
    dot = page.locator("#plot .point").get_attribute("transform")
    assert float(dot.split()[1].rstrip(")")) == pytest.approx(a * points[0][1] + b, abs=0.3)


def test_everything_can_be_done_with_keys(curves: Server, watch: Any) -> None:
    page = watch(curves.url).page
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "plot":
            break
    assert page.evaluate("document.activeElement.id") == "plot"
    assert page.locator("#plot .cursor path").count() == 1, "a cursor is seen where the keyboard is"
    page.keyboard.press("Enter")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowUp")
    page.keyboard.press("Enter")
    (x0, y0), (x1, y1) = points_of(page)
    assert x1 > x0 and y1 > y0 and "2 points" in page.text_content("#says")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Point 2 of 2")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    moved = points_of(page)
    assert moved[0] == [x0, y0] and moved[1][0] < x1 and moved[1][1] == pytest.approx(y1)
    page.keyboard.press("Delete")
    assert points_of(page) == [[x0, y0]]
    assert page.evaluate("document.activeElement.id") == "plot", "the keyboard is not lost with the point"
    page.keyboard.press("Control+z")
    assert len(points_of(page)) == 2


def test_a_reload_finds_the_same_state_and_two_pages_have_their_own(curves: Server, watch: Any) -> None:
    watched = watch(curves.url)
    left, right = watched.page, watched.opened(curves.url)
    click_at(left, 0.3, 0.3)
    click_at(right, 0.6, 0.6)
    click_at(right, 0.8, 0.2)
    on_left, on_right = points_of(left), points_of(right)
    assert len(on_left) == 1 and len(on_right) == 2 and on_left[0] not in on_right
    path = mean_path(right)
    right.reload()
    right.wait_for_selector("#plot path.mean", state="attached")
    assert points_of(right) == on_right and right.locator("#plot .point").count() == 2 and mean_path(right) == path
    assert points_of(left) == on_left


def test_a_wrong_token_shows_nothing_and_a_restarted_server_is_noticed(browser: Any) -> None:
    with Server(Explorer(Run.of(model_of()), samples=8)) as server:
        page = browser.new_page()
        answer = page.goto(server.url.replace(server.token, "x" * len(server.token)))
        assert answer.status == 403 and page.locator("svg").count() == 0
        page.goto(server.url)
        page.wait_for_selector("#numbers dt")
        port = server.port
    click_at(page, 0.5, 0.5)
    page.wait_for_selector("#gone:not([hidden])")
    assert "does not answer" in page.text_content("#gone") and page.locator("#retry").is_visible()
    with Server(Explorer(Run.of(model_of()), samples=8), port):
        page.click("#retry")
        page.wait_for_selector("#gone:has-text('started again')")
    page.close()


def test_after_a_pause_of_the_server_the_page_goes_on_where_it_was(watch: Any) -> None:
    explorer = Explorer(Run.of(model_of()), samples=8)
    first = Server(explorer).start()
    watched = watch(first.url)
    page = watched.page
    click_at(page, 0.3, 0.5)
    settle(page)
    first.stop()
    click_at(page, 0.6, 0.5)
    page.wait_for_selector("#gone:not([hidden])")
    second = Server(explorer, first.port)
    second.token = first.token
    with second:
        page.click("#retry")
        page.wait_for_selector("#gone[hidden]", state="attached")
        assert len(points_of(page)) == 2
        watched.complaints[:] = [text for text in watched.complaints if "ERR_CONNECTION" not in text]


def test_painting_erasing_and_revealing(images: Server, watch: Any) -> None:
    page = watch(images.url).page
    assert page.locator("#map").is_visible() and page.locator("#curve").is_hidden()
    page.select_option("#brush", "0")
    stroke(page, [(0.1, 0.06), (0.9, 0.06)])
    painted = points_of(page)
    assert len(painted) == 6 and {p[0] for p in painted} == {-1.0} and sorted(p[1] for p in painted) == pytest.approx(np.linspace(-1, 1, 6))
    assert "Observed: 6 of 48" in page.text_content("figcaption >> nth=0")
    page.click("#erase")
    stroke(page, [(0.1, 0.06), (0.12, 0.06)])
    assert len(points_of(page)) == 5
    page.click("#undo")
    assert len(points_of(page)) == 6
    page.click("#paint")
    load_task(page, "1", "0.1")
    loaded = points_of(page)
    assert len(loaded) == 5 and page.locator("#faint-row").is_visible()
    truth = {tuple(x): y[0] for x, y in zip(*(part.tolist() for part in images.explorer.subject.data[1][:2]), strict=True)}
    stroke(page, [(0.1, 0.5), (0.9, 0.55)])
    revealed = points_of(page)
    assert len(revealed) > 5 and all(truth[(a, b)] == pytest.approx(y, abs=1e-12) for a, b, y in revealed)
    assert f"{48 - len(revealed)} points that the model does not see" in page.text_content("#score")
    mean = page.evaluate("document.querySelectorAll('#panels canvas')[1].toDataURL()")
    page.focus("canvas.live")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert len(points_of(page)) == len(revealed) + 1
    assert page.evaluate("document.querySelectorAll('#panels canvas')[1].toDataURL()") != mean
    page.reload()
    page.wait_for_selector("#numbers dt")
    assert len(points_of(page)) == len(revealed) + 1
    page.click("[data-mode=curve]")
    page.wait_for_selector("#plot path.mean", state="attached")
    assert page.locator("#held input").count() == 1


def test_a_thousand_points(curves: Server, watch: Any) -> None:
    page = watch(curves.url).page
    x = np.linspace(-2, 2, 1000)
    body = {"do": "paint", "x": x[:, None].tolist(), "y": np.sin(x)[:, None].tolist()}
    page.evaluate(
        "async body => fetch('api/change', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
        "body: JSON.stringify({page: new URL(location.href).searchParams.get('page'), ...body})})",
        body,
    )
    page.reload()
    page.wait_for_selector("#plot .point >> nth=999", state="attached")
    settle(page)
    assert page.locator("#plot .point").count() == 1000
    assert page.evaluate("document.querySelectorAll('#plot [tabindex=\"0\"]').length") <= 1, "nobody can tab through a thousand points"
    x0, y0 = centre(page, "#plot .point:nth-child(500) .dot")
    page.mouse.move(x0, y0)
    page.mouse.down()
    page.mouse.move(x0, y0 - 120, steps=5)
    page.mouse.up()
    found = points_of(page)
    moved = [i for i, p in enumerate(found) if abs(p[1] - np.sin(x[i])) > 1e-9]
    assert len(found) == 1000 and len(moved) == 1 and found[moved[0]][1] > np.sin(x[moved[0]])


def test_a_task_is_found_loaded_and_scored(curves: Server, watch: Any) -> None:
    page = watch(curves.url).page
    load_task(page, "day 7", "0.25")
    assert len(points_of(page)) == 5 and page.locator("#plot .target").count() == 15
    assert "15 points that the model does not see" in page.text_content("#score")
    first = points_of(page)
    page.click("#again")
    assert points_of(page) != first
    page.fill("#search", "night")
    page.wait_for_selector("#names-count:has-text('0 of 12')")


def test_settings_are_kept_and_the_axis_can_be_chosen(curves: Server, watch: Any) -> None:
    page = watch(curves.url).page
    for name, value in (("samples", "3"), ("noise", "1"), ("curves", "4")):
        page.evaluate(
            "([id, v]) => { const e = document.getElementById(id); e.value = v; e.dispatchEvent(new Event('input')); }", [name, value]
        )
    page.fill("#low", "-1")
    page.press("#low", "Tab")
    settle(page)
    assert page.locator("#plot .shapes path.sample").count() == 4
    page.reload()
    page.wait_for_selector("#plot path.mean", state="attached")
    kept = state_of(page)["state"]["settings"]
    assert (kept["samples"], kept["noise"], kept["curves"], kept["low"]) == (128, 2.0, 4, -1.0)
    assert page.input_value("#samples") == "3" and page.input_value("#noise") == "1" and page.input_value("#low") == "-1"
    page.fill("#low", "99")
    page.press("#low", "Tab")
    assert "smaller to a larger" in page.text_content("#refused") and page.input_value("#low") == "-1"


def test_pictures_and_data_are_saved_by_the_browser_itself(curves: Server, images: Server, watch: Any, tmp_path: Any) -> None:
    page = watch(curves.url).page
    click_at(page, 0.4, 0.3)
    settle(page)

    def saved(page: Any, name: str) -> bytes:
        with page.expect_download() as found:
            page.click(f"#save-{name}")
        path = tmp_path / found.value.suggested_filename
        found.value.save_as(path)
        return bytes(path.read_bytes())

    picture = saved(page, "svg")
    assert picture.startswith(b"<svg") and b"class=" not in picture and b"level [m]" in picture
    assert saved(page, "png")[:8] == b"\x89PNG\r\n\x1a\n"
    rows = list(csv.reader(saved(page, "data").decode().splitlines()))
    assert rows[0] == ["role", "time", "level"] and [float(v) for v in rows[1][1:]] == pytest.approx(points_of(page)[0])
    rows, answer = list(csv.reader(saved(page, "predictions").decode().splitlines())), state_of(page)["answer"]
    assert rows[0][:4] == ["time", "level mean", "level 2.5 %", "level 25 %"] and len(rows) == 201
    assert [float(row[1]) for row in rows[1:]] == pytest.approx(answer["mean"], rel=1e-4, abs=1e-5)
    page = watch(images.url).page
    assert saved(page, "png")[:8] == b"\x89PNG\r\n\x1a\n" and saved(page, "svg").startswith(b"<svg")
    assert len(saved(page, "predictions").decode().splitlines()) == 49


def test_a_phone_shows_everything_without_sideways_scrolling_and_takes_fingers(curves: Server, images: Server, watch: Any) -> None:
    for server in (curves, images):
        page = watch(server.url, viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2).page
        settle(page)
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        small = page.evaluate(
            "[...document.querySelectorAll('button, select, summary')]"
            ".filter(e => e.offsetParent && e.getBoundingClientRect().height < 28).length"
        )
        assert small == 0
    page = watch(curves.url, viewport=PHONE, has_touch=True, is_mobile=True).page
    box = page.locator("#plot").bounding_box()
    page.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.4 * box["height"])
    assert len(points_of(page)) == 1


def luminance(colour: str) -> float:
    parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_is_readable_in_light_and_dark_and_all_controls_have_names(curves: Server, watch: Any) -> None:
    for scheme in ("light", "dark"):
        page = watch(curves.url, color_scheme=scheme, reduced_motion="reduce").page
        settle(page)
        pairs = page.evaluate(
            """() => [...document.querySelectorAll('h1, h2, p, dt, dd, label, output, button:not(:disabled), summary')]
            .filter(e => e.offsetParent && e.textContent.trim()).map(e => {
              let box = e;
              while (getComputedStyle(box).backgroundColor === 'rgba(0, 0, 0, 0)') box = box.parentElement;
              return [getComputedStyle(e).color, getComputedStyle(box).backgroundColor, e.textContent.slice(0, 30)];
            })"""
        )
        assert len(pairs) > 20
        for ink, paper, words in pairs:
            a, b = sorted((luminance(ink), luminance(paper)), reverse=True)
            assert (a + 0.05) / (b + 0.05) >= 4.5, (scheme, words, ink, paper)
        assert (luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2) == (scheme == "dark")
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll('button, input, select, [role=application]')]
            .filter(e => e.offsetParent || e.ownerSVGElement)
            .filter(e => !(e.textContent.trim() || e.labels?.length
              || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')))
            .map(e => e.outerHTML)"""
        )
        assert unnamed == []
        page.click("#theme")
        page.click("#theme")
        assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2, "the button overrides the system"


@pytest.mark.parametrize(
    "likelihood", [bnnp.Bernoulli(), bnnp.Categorical(3), bnnp.Poisson(), bnnp.Beta(), bnnp.StudentT()], ids=lambda v: type(v).__name__
)
def test_every_kind_of_output_can_be_clicked(likelihood: Any, watch: Any) -> None:
    with Server(Explorer(Run.of(model_of(likelihood=likelihood)), samples=8)) as server:
        page = watch(server.url).page
        click_at(page, 0.4, 0.2)
        click_at(page, 0.6, 0.8)
        values = [y for _, y in points_of(page)]
        assert len(values) == 2 and values[0] > values[1]
        likelihood.check(torch.tensor(values)[:, None])
        shapes = page.locator("#plot .shapes rect.cell" if isinstance(likelihood, bnnp.Categorical) else "#plot path.band95").count()
        assert shapes > 0 and page.locator("#noise-row").is_hidden()
