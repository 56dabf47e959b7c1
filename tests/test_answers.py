"""What a trained model says of files: each task as if it were alone, names kept, and files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnp
from bnnp.data.collection import Collection, Column
from bnnp.runs import Run
from bnnp.workflow.answers import diagnose, evaluate, predict, sample
from bnnp.workflow.writing import write_table


def collection(sizes: list[int], outputs: int = 1, gaps: bool = False, seed: int = 0, y: Any = None) -> Collection:
    rng = np.random.default_rng(seed)
    made = []
    for n in sizes:
        x = rng.normal(size=(n, 2))
        values = rng.normal(size=(n, outputs)) if y is None else y(rng, n)
        if gaps:
            values = np.where(rng.random(values.shape) < 0.4, np.nan, values)
        made.append((x, values))
    names = [f"task {i}" for i in range(len(sizes))]
    return Collection.of(made, ["a", Column("b", "m")], [Column(f"y{j}", "kg") for j in range(outputs)], names=names)


def run(outputs: int = 1, likelihood: Any = None, **others: Any) -> Run:
    model = bnnp.BNNP(2, outputs, hidden=(5,), likelihood=likelihood, missing_outputs=outputs > 1, seed=3).double()
    return Run.of(model, ["a", Column("b", "m")], [Column(f"y{j}", "kg") for j in range(outputs)], **others)


@pytest.mark.parametrize(("outputs", "gaps"), [(1, False), (1, True), (2, True)])
def test_each_task_is_answered_as_if_it_were_alone(outputs: int, gaps: bool) -> None:
    """Many tasks of any sizes, in batches with padding, against one call of the model for each."""
    fitted = run(outputs)
    contexts = collection([3, 0, 7, 1] * 5, outputs, gaps)
    targets = collection([2, 5, 1, 0] * 5, outputs, seed=1)
    answer = predict(fitted, contexts, targets, quantiles=(0.1,), num_samples=8, seed=5)
    table = answer.flat()
    assert list(table["task"]) == [name for name, (x, _, _) in zip(targets.names, targets, strict=True) for _ in x]
    for i, ((xc, yc, mask), (xt, _, _)) in enumerate(zip(contexts, targets, strict=True)):
        if len(xt) == 0:
            assert len(answer.columns["y0_mean"][i]) == 0
            continue
        seen = mask.any(1)
        own = mask[seen] if outputs > 1 else mask[seen, 0]
        alone = fitted.model.condition(xc[seen], np.nan_to_num(yc[seen]), mask=own, num_samples=8, seed=5).predict(xt)
        for j in range(outputs):
            np.testing.assert_allclose(answer.columns[f"y{j}_mean"][i], alone.mean[:, j], rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(answer.columns[f"y{j}_std"][i], alone.std[:, j], rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(answer.columns[f"y{j}_q10"][i], alone.quantile(0.1)[:, j], rtol=1e-5, atol=1e-7)


def test_tasks_are_found_by_name_whatever_their_order() -> None:
    fitted, contexts, targets = run(), collection([3, 4, 5]), collection([2, 2, 2], seed=1)
    a = predict(fitted, contexts, targets, num_samples=4).columns["y0_mean"]
    b = predict(fitted, contexts.subset([2, 0, 1]), targets, num_samples=4).columns["y0_mean"]
    np.testing.assert_allclose(np.stack(a), np.stack(b), rtol=1e-9)
    with pytest.raises(ValueError, match=r"'task 2'.*there are contexts for 'task 0', 'task 1'"):
        predict(fitted, contexts[:2], targets)


def test_without_contexts_it_is_the_prior() -> None:
    fitted, targets = run(), collection([3, 4], seed=1)
    answer = predict(fitted, None, targets, num_samples=2000)
    draws = fitted.model.prior_samples(targets[0][0], 4000, seed=1)
    spread = torch.as_tensor(np.asarray(draws)).reshape(4000, -1).std(0)
    np.testing.assert_allclose(answer.columns["y0_std_epistemic"][0], spread, rtol=0.15)


def test_levels_outside_zero_and_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1. Got 0.5, 1.5"):
        predict(run(), None, collection([2]), quantiles=(0.5, 1.5))


@pytest.mark.parametrize("classes", [2, 3])
def test_draws_of_labels_are_probabilities_and_names(classes: int) -> None:
    levels = ["sick", "well", "unknown"][:classes]
    likelihood = bnnp.Bernoulli() if classes == 2 else bnnp.Categorical(3)
    fitted = run(likelihood=likelihood, recipe={"kind": "table", "labels": {"y0": levels}})
    targets = collection([4, 3], seed=1)
    functions, noisy = (sample(fitted, None, targets, n=2, noisy=kind, num_samples=4).columns for kind in (False, True))
    assert list(functions) == [f"y0_sample{i}_p_{name}" for i in (1, 2) for name in levels]
    for i in (1, 2):
        p = np.stack([functions[f"y0_sample{i}_p_{name}"][0] for name in levels])
        np.testing.assert_allclose(p.sum(0), 1.0, rtol=1e-9)
    assert list(noisy) == ["y0_sample1", "y0_sample2"] and {*noisy["y0_sample1"][0], *noisy["y0_sample2"][1]} <= {*levels}


@pytest.mark.parametrize("classes", [2, 3])
def test_labels_are_answered_by_name(classes: int) -> None:
    likelihood = bnnp.Bernoulli() if classes == 2 else bnnp.Categorical(3)
    levels = ["sick", "well", "unknown"][:classes]
    fitted = run(likelihood=likelihood, recipe={"kind": "table", "labels": {"y0": levels}})
    contexts = collection([6], y=lambda rng, n: rng.integers(0, classes, (n, 1)) * 1.0)
    answer = predict(fitted, contexts, collection([4], seed=1), num_samples=4)
    p = np.stack([answer.columns[f"y0_p_{name}"][0] for name in levels])
    np.testing.assert_allclose(p.sum(0), 1.0, rtol=1e-9)
    assert [levels[k] for k in p.argmax(0)] == list(answer.columns["y0"][0])


def test_points_far_from_training_are_told() -> None:
    fitted = run()
    training = [(x, y) for x, y, _ in collection([9] * 4)]
    bnnp.meta_train(fitted.model, training, steps=1, progress=False)
    x = np.array([[0.0, 0.0], [50.0, 0.0]])
    answer = predict(fitted, None, Collection.of([(x, np.full((2, 1), np.nan)), (x[:1], np.zeros((1, 1)))], ["a", "b"], ["y0"]))
    assert answer.remarks[0].startswith("1 of 2 points") and answer.remarks[1] == ""
    assert answer.columns["distance"][0][1] > 1 > answer.columns["distance"][0][0]


def test_draws_are_coherent_and_have_the_right_spread() -> None:
    fitted, contexts, targets = run(), collection([5, 6]), collection([3, 2], seed=1)
    answer = sample(fitted, contexts, targets, n=400, num_samples=400)
    draws = np.stack([answer.columns[f"y0_sample{i + 1}"][0] for i in range(400)])
    told = predict(fitted, contexts, targets, num_samples=400)
    np.testing.assert_allclose(draws.std(0), told.columns["y0_std_epistemic"][0], rtol=0.2)
    assert [len(v) for v in answer.columns["y0_sample7"]] == [3, 2]


def test_diagnoses_have_a_sentence_for_each_task() -> None:
    found = diagnose(run(), collection([5, 0, 6]), num_samples=32)
    assert [row["points"] for row in found] == [5, 0, 6] and all(row["sentence"] for row in found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_scores_are_those_of_evaluate() -> None:
    fitted, tasks = run(), collection([8, 9, 1, 7], gaps=False)
    found = evaluate(fitted, tasks, num_samples=4)
    assert sorted(found) == [0.1, 0.3, 0.5]
    direct = bnnp.evaluate(fitted.model, [(x, y) for x, y, _ in tasks if len(x) > 1], num_samples=4, context_fraction=0.3)
    assert found[0.3].summary["joint_log_density"] == pytest.approx(direct.summary["joint_log_density"])
    with pytest.raises(ValueError, match="at least 2 observed points"):
        evaluate(fitted, collection([1, 0]))


def odd(inputs: list[str], outputs: list[str], likelihood: Any = None) -> tuple[Run, Collection]:
    """Return a run that was trained a step, and points for it, with these names."""
    rng, labels = np.random.default_rng(0), likelihood is not None
    made = [
        (rng.normal(size=(5, len(inputs))), rng.integers(0, 2, (5, len(outputs))) * 1.0 if labels else rng.normal(size=(5, len(outputs))))
        for _ in range(4)
    ]
    model = bnnp.BNNP(len(inputs), len(outputs), hidden=(3,), likelihood=likelihood)
    bnnp.meta_train(model, made, steps=1, num_samples=2, progress=False)
    columns = [Column(name, f"unit of {name}") for name in outputs]
    return Run.of(model, inputs, columns), Collection.of(made, inputs, columns)


@pytest.mark.parametrize("inputs", [["distance", "task"], ["y_mean", "y_sample1"], ["task", "task_"]])
def test_what_is_said_goes_over_no_input(inputs: list[str]) -> None:
    fitted, points = odd(inputs, ["y"])
    for answer in (predict(fitted, points, points, num_samples=2), sample(fitted, points, points, n=1, num_samples=2)):
        flat = answer.flat()
        for j, name in enumerate(inputs):
            np.testing.assert_array_equal(flat[name], np.concatenate([x[:, j] for x, _, _ in points]))
        assert len(flat) == 1 + 2 + len(answer.columns) and list(next(iter(flat.values()))) == [str(i) for i in range(4) for _ in range(5)]


@pytest.mark.parametrize("outputs", [["t", "t_max"], ["t_max", "t"], ["heart_p_wave", "t"]])
def test_units_are_those_of_the_output_itself(outputs: list[str]) -> None:
    fitted, points = odd(["x"], outputs)
    drawn, told = sample(fitted, None, points, n=1, num_samples=2), predict(fitted, None, points, num_samples=2)
    for name in outputs:
        assert told.units[f"{name}_mean"] == told.units[f"{name}_q05"] == drawn.units[f"{name}_sample1"] == f"unit of {name}"


def test_several_outputs_of_two_labels_are_each_answered() -> None:
    """They are not the labels of one output, and an output may be called what another column is."""
    fitted, points = odd(["x"], ["distance", "b"], bnnp.Bernoulli())
    answer = predict(fitted, points, points, num_samples=4)
    alone = fitted.model.condition(points[0][0], points[0][1], num_samples=4).predict(points[0][0]).probs
    for j, name in enumerate(["distance", "b"]):
        np.testing.assert_allclose(answer.columns[f"{name}_p_1"][0], alone[:, j], rtol=1e-5)
        np.testing.assert_allclose(answer.columns[f"{name}_p_0"][0], 1 - alone[:, j], rtol=1e-5)
        assert list(answer.columns[name][0]) == [str(int(p > 0.5)) for p in alone[:, j]]
    assert len(answer.columns["distance"]) == len(answer.columns["distance_"]) == 4


ODD = {
    "km/h": np.array([1.0, 2.0]), "km_h": np.array([3.0, 4.0]), "{a}": np.array([5, 6]), ".b ": np.array([0.5, np.nan]),
    "note": np.array(["wet", None], dtype=object), "blank": np.array(["wet", float("nan")], dtype=object),
    "when": np.array(["2020-01-01T06:00", "NaT"], dtype="datetime64[ns]"), "count": np.array([1, None], dtype=object),
}  # fmt: skip


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".nc", ".json"])
def test_odd_names_and_gaps_stay_what_they_are(ending: str, tmp_path: Path) -> None:
    """A gap in a column of text is no text "nan", a time is a time, and names that a format cannot hold are told beside others."""
    path = tmp_path / f"a{ending}"
    write_table(path, ODD, {"km/h": "km/h"})
    if ending == ".json":
        found = json.loads(path.read_text())
        assert (
            found["note"] == found["blank"] == ["wet", None]
            and found["count"] == [1.0, None]
            and found["when"] == ["2020-01-01T06:00", None]
        )
        assert list(found) == list(ODD)
        return
    if ending == ".nc":
        import xarray

        with xarray.open_dataset(path) as ds:
            when = ds["when"].values
            by_name = {ds[name].attrs.get("long_name", name): ds[name].values.tolist() for name in ds.data_vars}
            assert ds["km_h"].attrs["units"] == "km/h" or ds["km_h_"].attrs["units"] == "km/h"
        assert by_name["note"] == by_name["blank"] == ["wet", ""] and when[0] == np.datetime64("2020-01-01T06:00")
        assert by_name["km/h"] == [1.0, 2.0] and by_name["km_h"] == [3.0, 4.0] and by_name["{a}"] == [5, 6] and list(by_name) == list(ODD)
        return
    import pandas

    frame = pandas.read_parquet(path) if ending == ".parquet" else pandas.read_csv(path)
    assert list(frame) == list(ODD) and frame["note"][0] == "wet" and frame["count"][0] == 1
    assert bool(frame[["note", "blank", "when", "count"]].isna().iloc[1].all())


TABLE = {"task": np.array(["ä", "b, c"], dtype=object), "t": np.array([0.5, 1.5]), "y_mean": np.array([1.0, np.nan])}


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".nc", ".json", ".CSV"])
def test_tables_are_read_as_they_were_written(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    write_table(path, TABLE, {"t": "s"})
    if ending == ".json":
        assert json.loads(path.read_text()) == {"task": ["ä", "b, c"], "t": [0.5, 1.5], "y_mean": [1.0, None]}
        return
    if ending == ".nc":
        import xarray

        with xarray.open_dataset(path) as ds:
            found = {name: ds[name].values for name in ds.data_vars}
            assert ds["t"].attrs["units"] == "s"
    else:
        import pandas

        found = dict(pandas.read_parquet(path) if ending == ".parquet" else pandas.read_csv(path))
    assert list(found["task"]) == list(TABLE["task"])
    for name in ("t", "y_mean"):
        np.testing.assert_array_equal(np.asarray(found[name]), TABLE[name])


def test_an_ending_that_says_nothing_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in .csv, .parquet, .nc, .json. Got a.xls"):
        write_table(tmp_path / "a.xls", TABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".nc", ".json"])
def test_a_disk_that_is_full_leaves_the_old_file(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a{ending}"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_table(path, TABLE)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [f"a{ending}"]
