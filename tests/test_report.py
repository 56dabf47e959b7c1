"""The report: complete in itself, all sections there, hostile names harmless, verdicts right, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnp
from bnnp.data.collection import Collection, Column
from bnnp.evaluation import Evaluation
from bnnp.report import Report, judging, write_report, writing
from bnnp.report.judging import OWN, Judged, Verdict
from bnnp.runs import Run, write_record

HOSTILE = "<script>alert('$1')</script>\"'&\x07"
SECTIONS = ["verdict", "data", "model", "training", "prior", "scores", "calibration", "tasks", "next"]


class Page(HTMLParser):
    """Collect tags, addresses and texts, and check that what is opened is closed."""

    VOID = frozenset({"meta", "img", "br", "link", "!doctype"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def sinusoids(count: int, rng: np.random.Generator) -> list[Any]:
    tasks = []
    for _ in range(count):
        x = rng.uniform(-3, 3, size=(rng.integers(8, 14), 1))
        y = np.sin(x + rng.uniform(0, 6)) + 0.1 * rng.normal(size=x.shape)
        y[0] = np.nan
        tasks.append((x, y))
    return tasks


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Collection, Collection]:
    """Return a run with its folder, as `bnnp fit` leaves it, whose every name is hostile, and its training and test tasks."""
    folder = tmp_path_factory.mktemp("run")
    data = Collection.of(
        sinusoids(16, np.random.default_rng(0)),
        [Column(f"t {HOSTILE}", HOSTILE)],
        [Column(f"level {HOSTILE}", HOSTILE)],
        names=[f"{i} {HOSTILE}" for i in range(16)],
        notes=(f"1 row was dropped: {HOSTILE}",),
    )
    train, test = data.subset(range(10)), data.subset(range(10, 16))
    model = bnnp.BNNP(1, 1, hidden=(8,), activation="tanh")
    bnnp.meta_train(model, list(train), steps=20, validation=0.2, validate_every=5, log_every=5, folder=folder / "fit", progress=False)
    model.save(folder)
    parts = {"train": train.names, "validation": [], "test": test.names, "how": f"at random {HOSTILE}"}
    columns = {side: [vars(column) for column in getattr(data, side)] for side in ("inputs", "outputs")}
    source = {"path": HOSTILE, "fingerprint": "", "tasks": 16}
    record = {"recipe": {"kind": HOSTILE}, "data": source, "config": {"a": {HOSTILE: HOSTILE}}, "division": parts, "status": "done"}
    write_record(folder, {**columns, **record, "result": {"seconds": 1.0, "skipped": 0}})
    return Run.open(folder), train, test


@pytest.fixture(scope="module")
def written(fitted: tuple[Run, Collection, Collection], tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str, list[str]]:
    said: list[str] = []
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    report = write_report(*fitted, path, num_samples=8, progress=said.append)
    return report, path.read_text("utf-8"), said


def test_the_page_is_complete_in_itself(written: tuple[Report, str, list[str]]) -> None:
    page = Page(written[1])
    assert not {"script", "iframe", "link", "object", "embed", "form"} & set(page.tags)
    addresses = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "poster", "background")]
    assert addresses and all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "http:" not in written[1] and "https:" not in written[1] and "url(" not in written[1] and "@import" not in written[1]
    assert any("default-src 'none'" in value for _, _, value in page.attributes)


def test_all_sections_are_there_and_linked(written: tuple[Report, str, list[str]]) -> None:
    page = Page(written[1])
    assert [value for tag, name, value in page.attributes if tag == "section" and name == "id"] == SECTIONS
    assert [value for tag, name, value in page.attributes if tag == "a" and name == "href"] == [f"#{name}" for name in SECTIONS]
    assert page.tags.count("img") == 9  # data, two curves, prior, calibration, four tasks
    assert all(value for tag, name, value in page.attributes if tag == "img" and name == "alt")
    for words in ("joint log density", "GP fitted to the task", "10 % seen", "50 % seen", "20 steps."):
        assert words in page.text, words


def test_hostile_names_are_shown_and_do_nothing(written: tuple[Report, str, list[str]]) -> None:
    assert "<script" not in written[1].lower() and "\x07" not in written[1]
    text = Page(written[1]).text
    shown = HOSTILE.replace("\x07", " ")
    for words in (
        f"level {shown}",
        f"t {shown}",
        f"1 row was dropped: {shown}",
        f"at random {shown}",
        f"data are from {shown}",
        f"a.{shown}",
    ):
        assert words in text, words
    assert any(f"{i} {shown}" in text for i in range(10, 16))


def test_the_report_says_what_the_page_says(written: tuple[Report, str, list[str]]) -> None:
    report, html, said = written
    text = Page(html).text
    assert report.verdicts and all(verdict.sentence in text for verdict in report.verdicts)
    assert "few tasks" in [finding.key for finding in report.findings]
    assert all(words.replace("\x07", " ") in text for finding in report.findings for words in (finding.warning, finding.advice))
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["test_tasks"] == 6
    shares = {row["share"] for row in report.scores}
    assert shares == {0.1, 0.3, 0.5} and {row["method"] for row in report.scores} > {OWN, "pooled regression"}
    assert said[0] == "rivals" and said[-1] == "pictures"


def test_a_failure_leaves_the_old_page(fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(writing, "default_rivals", lambda *_: {})
    monkeypatch.setattr(writing, "_tasks", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(*fitted, path, num_samples=2, context=[0.3])
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_labels_without_a_folder_and_without_rivals_that_apply(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tasks = [(rng.normal(size=(9, 2)), rng.integers(0, 3, size=(9, 1)).astype(float)) for _ in range(25)]
    data = Collection.of(tasks, ["a", "b"], ["label"], groups=["one"] * 25, ordered=True)
    known = {"notes": ["'label' became labels: 0 = ill, 1 = well, 2 = unsure."]}  # at the fit; a second reading learns nothing
    run = Run.of(bnnp.BNNP(2, 1, hidden=(4,), likelihood=bnnp.Categorical(3)), data=known)
    report = write_report(
        run, data.subset(range(20)), data.subset(range(18, 25)), tmp_path / "r.html", num_samples=8, max_tasks=5, context=[0.3]
    )
    text = Page((tmp_path / "r.html").read_text("utf-8")).text
    assert "became labels: 0 = ill" in text and "Nothing was dropped" not in text and "point of a task is seen" not in text
    assert "class frequencies of the task" in text and "accuracy" in text and "There is no log" in text
    assert any("regressions and Gaussian processes were left out" in note for note in report.notes) and report.test_tasks == 5
    keys = [finding.key for finding in report.findings]
    assert {"not trained", "few test tasks", "groups", "test tasks were learned from"} <= set(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": slice(0, 0)}, "Expected test tasks. Got none"),
        ({"train": slice(0, 0)}, "Expected training tasks. Got none"),
        ({"context": [1.0]}, "shares of context"),
        ({"max_tasks": 0}, "max_tasks"),
        ({"model": bnnp.BNNP(2, 1, hidden=())}, "with 2 inputs and 1 outputs"),
        ({"one point": True}, "at least 2 points"),
    ],
)
def test_what_cannot_be_reported_is_refused(fitted: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run, train, test = fitted
    train, test = train[change.pop("train", slice(None))], test[change.pop("test", slice(None))]
    run = Run.of(change.pop("model")) if "model" in change else run
    if change.pop("one point", False):
        test = Collection.of([(np.zeros((1, 1)), np.ones((1, 1)))], ["t"], ["y"])
    with pytest.raises(ValueError, match=message):
        write_report(run, train, test, tmp_path / "r.html", **change)
    assert not list(tmp_path.iterdir())


def scores(values: Any, **others: tuple[float, float]) -> Evaluation:
    per_task = {"joint_log_density": torch.tensor(values, dtype=torch.float64)}
    return Evaluation(per_task, {"joint_log_density": bnnp.evaluation.mean_and_se(per_task["joint_log_density"]), **others}, None)


def judged(own: Any, rivals: dict[str, Any], points: int = 50, **coverage: tuple[float, float]) -> Judged:
    case = judging.Case(0, "a", 2, *[(np.zeros((points, 1)), np.zeros((points, 1)), np.ones((points, 1), dtype=bool))] * 2)
    return Judged(0.1, (case,) * len(own), {OWN: scores(own, **coverage), **{k: scores(v) for k, v in rivals.items()}}, ())


@pytest.mark.parametrize(
    ("own", "rivals", "word", "rival"),
    [
        ([1.0, 2.0, 3.0], {"a": [0.5, 1.4, 2.6], "b": [-9.0, -9.0, -9.0]}, "ahead", "a"),
        ([0.5, 1.4, 2.6], {"a": [1.0, 2.0, 3.0], "b": [0.0, 0.0, 0.0]}, "behind", "a"),
        ([1.0, 2.0, 3.0], {"a": [2.0, 1.9, 2.2], "b": [0.0, 0.0, 0.0]}, "level", "a"),
        ([1.0], {"a": [0.0]}, "unknown", "a"),
        ([-math.inf, 1.0], {"a": [0.0, 0.1]}, "behind", "a"),
        ([1.0, 2.0], {"a": [5.0, math.nan], "b": [0.0, 1.1]}, "ahead", "b"),
        ([1.0, 1.0], {"a": [1.0, 1.0]}, "level", "a"),
    ],
)
def test_verdicts_are_those_of_paired_differences(own: Any, rivals: Any, word: str, rival: str) -> None:
    verdict = judging.compare(judged(own, rivals))
    assert verdict is not None and (verdict.word, verdict.rival) == (word, rival)
    assert {"ahead": "ahead of", "behind": "behind", "level": "level with", "unknown": "cannot tell"}[word] in verdict.sentence
    assert f"({rival})" in verdict.sentence and "10 % of the points" in verdict.sentence
    differences = np.array(own) - np.array(rivals[rival])
    if len(own) > 1 and np.isfinite(differences).all():
        assert verdict.difference == pytest.approx(differences.mean())
        assert verdict.se == pytest.approx(differences.std(ddof=1) / math.sqrt(len(own)))


def test_without_rivals_there_is_no_verdict() -> None:
    assert judging.compare(judged([1.0, 2.0], {})) is None


def found(**changes: Any) -> dict[str, judging.Finding]:
    """Return what is found of a faultless model and test, but for the changes."""
    tasks = [(np.linspace(0, 1, 5)[:, None] + 0.001 * i, i + np.arange(5.0)) for i in range(60)]
    data = Collection.of(tasks, [Column("t", "h")], ["y"])
    model = bnnp.BNNP(1, 1, hidden=())
    model.fit_scaling([bnnp.Task(torch.tensor(x), torch.tensor(y)[:, None]) for x, y in tasks])
    verdicts = [Verdict(0.1, "joint_log_density", "a", 1.0, 0.1, "ahead", "")]
    given: dict[str, Any] = {"train": data, "test": data.subset(range(20, 40)), "judged": [judged([1.0] * 20, {})], "verdicts": verdicts}
    given |= {"records": [{"step": 10 * i, "validation": 1.0, "skipped": 0} for i in range(20)], "pareto_k": torch.full((9,), 0.3)}
    given["train"] = data.subset([*range(20), *range(40, 60)])
    given |= changes
    return {finding.key: finding for finding in judging.findings(model, **given)}


FAULTS: dict[str, Callable[[], dict[str, Any]]] = {
    "behind a rival": lambda: {"verdicts": [Verdict(0.25, "joint_log_density", "a", -1.0, 0.1, "behind", "")]},
    "too sure": lambda: {"judged": [judged([1.0] * 20, {}, **{"coverage_0.8": (0.7, 0.02)})]},
    "too cautious": lambda: {"judged": [judged([1.0] * 20, {}, **{"coverage_0.5": (0.6, 0.02)})]},
    "few test tasks": lambda: {"judged": [judged([1.0] * 9, {})]},
    "still learning": lambda: {"records": [{"step": 10 * i, "validation": 0.1 * i, "skipped": 0} for i in range(20)]},
    "repeated values": lambda: {
        "train": Collection.of([(np.linspace(0, 2, 9)[:, None], i * (np.arange(9.0) > 1)) for i in range(25)], ["t"], ["y"])
    },
    "skipped steps": lambda: {"records": [{"step": 100, "validation": 1.0, "skipped": 2}]},
    "importance weights": lambda: {"pareto_k": torch.tensor([0.8, math.nan, 0.1])},
    "outside the training range": lambda: {
        "test": Collection.of([(np.linspace(0, 2, 5)[:, None], np.zeros(5))] * 3, ["t"], ["y"], names=["p", "q", "r"])
    },
}


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert found() == {}
    slight = {"coverage_0.8": (0.77, 0.001), "coverage_0.5": (0.6, 0.06)}  # a little off for sure; far off by chance
    assert found(judged=[judged([1.0] * 20, {}, **slight)]) == {}
    all_held = {"coverage_0.95": (1.0, 0.0)}  # of 40 points each tells little, of 1,000 it tells something
    assert found(judged=[judged([1.0] * 20, {}, points=2, **all_held)]) == {}
    assert list(found(judged=[judged([1.0] * 20, {}, points=50, **{"coverage_0.95": (0.85, 0.0)})])) == ["too sure"]
    assert found(records=[], pareto_k=None, verdicts=[]) == {}
    assert found(pareto_k=torch.tensor([0.8, 0.1, 0.1])) == {}


@pytest.mark.parametrize("key", FAULTS)
def test_each_fault_is_found_alone(key: str) -> None:
    result = found(**FAULTS[key]())
    assert list(result) == [key] and result[key].warning and result[key].advice


def test_warnings_carry_their_numbers() -> None:
    assert "25 %" in found(**FAULTS["behind a rival"]())["behind a rival"].warning
    assert "intervals of 80 % hold 70 ± 2 %" in found(**FAULTS["too sure"]())["too sure"].warning
    outside = found(**FAULTS["outside the training range"]())["outside the training range"].warning
    assert "40 %" in outside and "1.059 h" in outside
    assert "2 of 3" in found(**FAULTS["importance weights"]())["importance weights"].warning


def test_cuts_are_nested_and_share_their_targets() -> None:
    data = Collection.of(sinusoids(4, np.random.default_rng(2)), ["t"], ["y"])
    model = bnnp.BNNP(1, 1, hidden=())
    small, large = (judging.cases(data, range(4), share, 1, model, seed=3) for share in (0.0, 0.6))
    for i, (one, other) in enumerate(zip(small, large, strict=True)):
        assert len(one.context[0]) == 1 and len(other.context[0]) == round(0.6 * (data.sizes[i] - 1))
        np.testing.assert_array_equal(other.context[0][:1], one.context[0])
        np.testing.assert_array_equal(one.target[0][-len(other.target[0]) :], other.target[0])
        every = np.concatenate([other.context[0], other.target[0]])
        np.testing.assert_array_equal(np.sort(every[:, 0]), np.sort(data[i][0][1:, 0]))  # the first output was not observed
        assert not other.thinned


def test_costly_models_are_judged_on_fewer_tasks() -> None:
    def most(prior: str, points: int = 30, **options: Any) -> int:
        return judging.affordable(bnnp.BNNP(1, 1, hidden=(64, 64), prior=prior, **options), points, 64)

    assert most("shared", shared_noise=True) > 1000 > most("per_unit") > most("per_unit", points=60) > judging.FEWEST == most("per_layer")


def test_a_large_task_is_thinned() -> None:
    data = Collection.of([(np.arange(5000.0)[:, None], np.zeros(5000))], ["t"], ["y"])
    (case,) = judging.cases(data, [0], 0.5, 1, bnnp.BNNP(1, 1, hidden=()), seed=0)
    assert case.thinned and len(case.context[0]) == judging.MOST_CONTEXT and len(case.target[0]) == judging.MOST_TARGETS
    assert not set(case.context[0][:, 0]) & set(case.target[0][:, 0])
