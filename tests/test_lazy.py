"""Collections read as training goes on: the same run as one in memory, and files that hold surprises."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnp
from bnnp.data.collection import Collection, Column, divide
from bnnp.data.lazy import LazyTasks

READ: list[int] = []


def tasks(n: int = 12, points: int = 9, gaps: bool = False) -> Collection:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(n):
        x = rng.normal(size=(points, 1))
        y = np.sin(x + rng.normal()) + 0.1 * rng.normal(size=x.shape)
        y[0 if gaps else points :] = np.nan
        made.append((x, y))
    return Collection.of(made, ["t"], [Column("level", "m")], ordered=True)


def lazily(monkeypatch: pytest.MonkeyPatch, limit: int = 0) -> None:
    monkeypatch.setattr("bnnp.intake.LAZY_BYTES", limit)


def model() -> bnnp.BNNP:
    return bnnp.BNNP(1, 1, hidden=(4,)).double()


@pytest.mark.parametrize("validation", [None, 0.25])
@pytest.mark.parametrize("per_point", [False, True])
def test_a_run_on_files_is_the_run_in_memory(monkeypatch: pytest.MonkeyPatch, validation: float | None, per_point: bool) -> None:
    """Same seed, same batches, same parameters: only where the tasks are kept differs."""
    options: dict[str, Any] = {"steps": 4, "validation": validation, "per_point": per_point, "progress": False, "shrinkage": 1.0}
    in_memory, on_files = model(), model()
    bnnp.meta_train(in_memory, tasks(), **options)
    lazily(monkeypatch)
    bnnp.meta_train(on_files, tasks(), **options)
    for (name, a), b in zip(in_memory.state_dict().items(), on_files.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_of_large_tasks_a_few_points_are_taken_at_each_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each visit sees other points, no more than asked for, split in the proportions asked for; small tasks are seen whole."""
    sizes, seen = [], set()
    cut = bnnp.training.split  # type: ignore[attr-defined]

    def noted(batch: Any, num_context: torch.Tensor, generator: torch.Generator) -> Any:
        halves = cut(batch, num_context, generator)
        sizes.append((int(halves.context.counts.max()), batch.counts.tolist()))
        seen.update(batch.x[batch.mask].flatten().tolist())
        return halves

    monkeypatch.setattr("bnnp.training.split", noted)
    mixed = Collection.of([*tasks(3, points=50), *tasks(1, points=4)], ["t"], ["level"])
    trained = model()
    bnnp.meta_train(trained, mixed, steps=10, batch_size=4, max_points=8, context=(0.25, 0.5), progress=False)
    assert all(most <= 4 and sorted(counts) == [4, 8, 8, 8] for most, counts in sizes)
    assert len(seen) > 80 and int(trained.reference.most_context) == 4


def test_a_large_collection_is_not_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lazily(monkeypatch)
    monkeypatch.setattr("bnnp.data.lazy.SAMPLE_BYTES", 5 * 9 * 16)
    source, seen = tasks(200), set()

    def read(i: int) -> Any:
        seen.add(i)
        return source[i]

    large = Collection(read, source.sizes, source.names, source.inputs, source.outputs, fingerprint="a")
    bnnp.meta_train(model(), large, steps=3, batch_size=2, progress=False)
    assert len(seen) <= 5 + 3 * 2


def test_a_lazy_run_resumes_and_knows_its_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lazily(monkeypatch)
    whole, parts = model(), model()
    bnnp.meta_train(whole, tasks(), steps=6, folder=tmp_path / "whole", progress=False)
    monkeypatch.setattr("bnnp.training._Run._objective", stop_at(3))
    with pytest.raises(KeyboardInterrupt):
        bnnp.meta_train(parts, tasks(), steps=6, folder=tmp_path / "parts", progress=False)
    monkeypatch.undo()
    lazily(monkeypatch)
    with pytest.raises(ValueError, match="data"):
        bnnp.meta_train(model(), tasks(11), steps=6, folder=tmp_path / "parts", resume=True, progress=False)
    resumed = model()
    bnnp.meta_train(resumed, tasks(), steps=6, folder=tmp_path / "parts", resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def stop_at(step: int) -> Any:
    from bnnp.training import _Run

    objective = _Run._objective

    def stopped(self: Any, batch: Any) -> Any:
        if self.state.step == step:
            raise KeyboardInterrupt
        return objective(self, batch)

    return stopped


def test_tasks_without_observed_points_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lazily(monkeypatch)
    good, empty = tasks(6), tasks(1, gaps=True)
    mixed = Collection.of([*good, *empty], ["t"], ["level"])
    bnnp.meta_train(model(), mixed, steps=6, batch_size=3, progress=False)
    with pytest.raises(bnnp.TrainingError, match="at least 2 observed points"):
        bnnp.meta_train(
            model(), Collection.of([*tasks(1), *empty, *empty, *empty], ["t"], ["level"]), steps=6, batch_size=1, progress=False
        )


def test_what_is_wrong_in_a_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tasks(4)
    x, y, mask = source[2]
    bad = Collection.of([*source[:2], (np.where(x == x[3], np.inf, x), y, mask)], ["t"], ["level"], names=["a", "b", "winter 7"])
    with pytest.raises(ValueError, match=r"tasks\[2\] \(winter 7\).*finite"):
        LazyTasks(bad, torch.float32)[2]
    with pytest.raises(ValueError, match=r"1 inputs and 1 outputs.*Got 1 and 2: t, a, b"):
        bnnp.meta_train(model(), Collection.of([(x, np.hstack([y, y]))] * 3, ["t"], ["a", "b"]))


def test_a_collection_is_what_evaluate_takes() -> None:
    fitted = model()
    fitted.fit_scaling(LazyTasks(tasks(), torch.float64).sample())
    rng = np.random.default_rng(1)
    holes = [(x, np.where(rng.random(y.shape) < 0.3, np.nan, y)) for x, y, _ in tasks()]
    whole = [(x[~np.isnan(y[:, 0])], y[~np.isnan(y[:, 0])]) for x, y in holes]
    a, b = (bnnp.evaluate(fitted, t, context_fraction=0.5, num_samples=4) for t in (Collection.of(holes, ["t"], ["level"]), whole))
    assert a.num_tasks == b.num_tasks == 12 and a.to_dict().keys() == b.to_dict().keys()


# --- collections and their division ------------------------------------------------------------------------------


def test_subsets_find_their_tasks() -> None:
    source = tasks(5)
    part = source[1:4].subset([2, 0])
    assert list(part.names) == ["3", "1"] and part.find("1") == 1
    np.testing.assert_array_equal(part[0][0], source[3][0])
    assert part.fingerprint != source.fingerprint
    with pytest.raises(ValueError, match=r"'3', '1'. Got '9'"):
        part.find("9")


def test_what_is_held_out_shares_no_point_with_what_is_learned_from() -> None:
    """Windows of 4 with stride 1 share points with 3 neighbours."""
    windows = [set(range(i, i + 4)) for i in range(40)]
    source = Collection.of([(np.zeros((4, 1)), np.zeros(4))] * 40, ["t"], ["y"], ordered=True, overlap=3, groups=["a"] * 20 + ["b"] * 20)
    parts = divide(source, 0.2, 0.2)
    union = [{(source.groups[i], p) for i in part for p in windows[i]} for part in (parts.train, parts.validation, parts.test)]  # type: ignore[index]
    assert all(union) and not (union[0] & union[1] | union[0] & union[2] | union[1] & union[2])
    assert max(parts.train) > 20 and min(parts.test) < 20, "the last tasks of each group"


@pytest.mark.parametrize("length", [2, 7, 12, 20, 30])
def test_windows_that_overlap_more_than_a_part_is_long_share_no_point_either(length: int) -> None:
    """Of 60 windows with stride 1 some parts are shorter than the overlap: then nothing of them is left, not a part counted from behind."""
    source = Collection.of([(np.zeros((2, 1)), np.zeros(2))] * 60, ["t"], ["y"], ordered=True, overlap=length - 1)
    parts = divide(source, 0.2, 0.2)
    points = [{p for i in part for p in range(i, i + length)} for part in (parts.train, parts.validation, parts.test)]
    assert points[0] and points[2] and not (points[0] & points[1] | points[0] & points[2] | points[1] & points[2])


@pytest.mark.parametrize("names", [["a", "a", "a (2)"], ["a (2)", "a", "a", "a"], ["a", "a", "a (2)", "a (2)"]])
def test_names_differ_whatever_they_were(names: list[str]) -> None:
    found = Collection.of([(np.zeros((2, 1)), np.zeros(2))] * len(names), ["t"], ["y"], names=names).names
    assert len(set(found)) == len(names) and found[0] == names[0]


def test_many_groups_are_divided_at_once() -> None:
    """A hundred thousand tasks of as many groups take a moment, not a quarter of an hour."""
    count = 100_000
    source = Collection(lambda i: None, [2] * count, [str(i) for i in range(count)], (), (), groups=[str(i) for i in range(count)])  # type: ignore[arg-type, return-value]
    start = time.perf_counter()
    parts = divide(source)
    assert len(parts.train) == 70_000 and time.perf_counter() - start < 20


def test_whole_groups_are_held_out_where_there_are_many() -> None:
    groups = [f"p{i % 12}" for i in range(60)]
    source = Collection.of([(np.zeros((4, 1)), np.zeros(4))] * 60, ["t"], ["y"], ordered=True, groups=groups)
    parts = divide(source, 0.2, 0.2, seed=1)
    own = [{groups[i] for i in part} for part in (parts.train, parts.validation, parts.test)]
    assert [len(o) for o in own] == [8, 2, 2] and not own[0] & own[1] and not own[1] & own[2]
    assert sorted((*parts.train, *parts.validation, *parts.test)) == list(range(60))


@pytest.mark.parametrize(("count", "shares"), [(2, (0.4, 0.4)), (10, (0.5, 0.5)), (10, (-0.1, 0.2))])
def test_a_division_leaves_something_to_learn_from(count: int, shares: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        divide(Collection.of([(np.zeros((4, 1)), np.zeros(4))] * count, ["t"], ["y"]), *shares)


def test_the_description_counts_what_is_missing_and_warns() -> None:
    x = np.arange(4.0)[:, None]
    y = np.array([[1.0, np.nan], [2.0, np.nan], [3.0, 4.0], [np.nan, 5.0]])
    found = Collection.of([(x, y)] * 3, [Column("t", "s")], ["a", "b"]).describe()
    assert [row["missing"] for row in found.outputs] == [0.25, 0.5] and found.inputs[0]["max"] == 3.0
    assert found.points == (4, 4.0, 4) and found.tasks == found.sampled == 3
    text = str(found)
    assert "t [s]" in text and "50 % missing" in text and "3 tasks are few" in text
    assert found.to_dict()["outputs"][0]["mean"] == 2.0
