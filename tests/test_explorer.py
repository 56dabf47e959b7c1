"""The explorer without a browser: what a session shows is what the model says, and the server lets in nobody else."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bnnp
from bnnp.data.collection import Collection, Column
from bnnp.data.images import pixel_grid
from bnnp.explorer import Explorer, Server, Session, Subject, explore
from bnnp.explorer.answers import LEVELS, mixture_quantiles, score, tabulated_quantiles
from bnnp.explorer.lattice import MOST_CELLS, Lattice
from bnnp.explorer.server import HEADERS, MOST_BYTES, MOST_PAGES
from bnnp.explorer.session import GRID, MOST_POINTS, with_noise
from bnnp.explorer.wire import parse, plain
from bnnp.likelihoods import (
    Bernoulli,
    Beta,
    Categorical,
    Gaussian,
    Heteroscedastic,
    MultivariateGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from bnnp.runs import Run

SAMPLES = 8


def model_of(x_dim: int = 1, y_dim: int = 1, **options: Any) -> bnnp.BNNP:
    options = {"hidden": (6,), "prior": "shared", "activation": "tanh", **options}
    return bnnp.BNNP(x_dim, y_dim, **options).double()


def session_of(model: bnnp.BNNP | None = None, data: Collection | None = None, **options: Any) -> Session:
    return Session(Subject(Run.of(model or model_of(), **options), data), SAMPLES)


def tasks_of(count: int = 6, points: int = 12) -> Collection:
    rng = np.random.default_rng(0)
    tasks = [(x, np.sin(x)) for x in (rng.uniform(-2, 2, (points, 1)) for _ in range(count))]
    return Collection.of(tasks, inputs=["t"], outputs=[Column("level", "m")], names=[f"day {i}" for i in range(count)])


def pixels_of(h: int = 5, w: int = 4, count: int = 3) -> Collection:
    x = pixel_grid(h, w, torch.float64).numpy()
    rng = np.random.default_rng(0)
    return Collection.of(
        [(x, rng.uniform(size=(h * w, 1))) for _ in range(count)], ["row", "column"], ["grey"], recipe={"kind": "images", "shape": [h, w]}
    )


# --- a session -------------------------------------------------------------------------------------------------------

number = st.floats(-2, 2).map(lambda v: round(v, 3))
change = st.one_of(
    st.tuples(st.just("add"), number, number),
    st.tuples(st.just("move"), st.integers(0, 20), number, number),
    st.tuples(st.just("remove"), st.integers(0, 20)),
    st.tuples(st.sampled_from(["undo", "redo", "refresh", "clear"])),
    st.tuples(st.just("paint"), st.lists(st.tuples(number, number), min_size=1, max_size=4)),
)


def applied(session: Session, step: tuple[Any, ...]) -> None:
    verb, *rest = step
    n = len(session.state.x)
    if verb == "add":
        session.apply("add", {"x": [rest[0]], "y": [rest[1]]})
    elif verb == "move" and n:
        session.apply("move", {"index": rest[0] % n, "x": [rest[1]], "y": [rest[2]]})
    elif verb == "remove" and n:
        session.apply("remove", {"indices": [rest[0] % n]})
    elif verb == "paint":
        session.apply("paint", {"x": [[x] for x, _ in rest[0]], "y": [[y] for _, y in rest[0]]})
    elif verb in ("undo", "redo", "refresh", "clear"):
        session.apply(verb, {})


def by_hand(model: bnnp.BNNP, session: Session) -> bnnp.Posterior:
    """Return the posterior that the state says: some points conditioned on together, the others told one by one."""
    state, x, y = session.state, torch.as_tensor(session.state.x), torch.as_tensor(session.state.y)
    posterior = model.condition(x[: state.conditioned], y[: state.conditioned], num_samples=session.samples)
    for i in range(state.conditioned, len(x)):
        posterior = posterior.update(x[i : i + 1], y[i : i + 1])
    return posterior


@settings(max_examples=25)
@given(st.lists(change, max_size=12))
def test_after_any_changes_the_posterior_is_that_of_the_points_as_the_state_says(steps: list[tuple[Any, ...]]) -> None:
    model = model_of()
    session = session_of(model)
    for step in steps:
        applied(session, step)
    xt = torch.linspace(-2, 2, 9)[:, None].double()
    found, wanted = session.posterior().predict(xt), by_hand(model, session).predict(xt)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.std, wanted.std, rtol=1e-7, atol=1e-9)
    session.apply("refresh", {})
    state = session.state
    afresh = model.condition(torch.as_tensor(state.x), torch.as_tensor(state.y), num_samples=SAMPLES).predict(xt)
    torch.testing.assert_close(session.posterior().predict(xt).mean, afresh.mean)


@settings(max_examples=15)
@given(st.lists(change, min_size=1, max_size=10))
def test_undo_and_redo_go_through_the_very_same_states(steps: list[tuple[Any, ...]]) -> None:
    session = session_of()
    for step in steps:
        if step[0] not in ("undo", "redo"):
            applied(session, step)
    last, answer = session.state, session.answer()
    done = len(session.past)
    for _ in range(done):
        session.apply("undo", {})
    assert len(session.state.x) == 0 and not session.past
    for _ in range(done):
        session.apply("redo", {})
    assert session.state is last
    np.testing.assert_allclose(session.answer()["bands"], answer["bands"], rtol=1e-4, atol=1e-5)


def test_an_added_point_is_an_update_while_half_of_the_particles_count_and_else_conditions_afresh() -> None:
    model, xs = model_of(), np.linspace(-2, 2, 12)
    session, seen = session_of(model), set()
    for x in xs:
        before = session.posterior()
        session.apply("add", {"x": [float(x)], "y": [float(3 * np.sin(3 * x))]})
        told = before.update([[x]], [[3 * np.sin(3 * x)]])
        online = float(told.effective_sample_size) >= SAMPLES / 2
        seen.add(online)
        assert (session.state.conditioned < len(session.state.x)) == online
        if online:
            torch.testing.assert_close(session.posterior().effective_sample_size, told.effective_sample_size)
    assert seen == {True, False}


def test_changes_of_one_gesture_are_one_step_back() -> None:
    session = session_of()
    session.apply("add", {"x": [0.0], "y": [0.0]})
    for k in range(5):
        session.apply("move", {"index": 0, "x": [k / 5], "y": [1.0], "gesture": "one"})
    session.apply("move", {"index": 0, "x": [2.0], "y": [1.0], "gesture": "two"})
    session.apply("undo", {})
    assert session.state.x.tolist() == [[0.8]]
    session.apply("undo", {})
    assert session.state.x.tolist() == [[0.0]]


def test_the_answer_is_what_the_posterior_predicts() -> None:
    model = model_of()
    session = session_of(model)
    for x, y in ((-1.0, 0.3), (0.2, -0.5), (1.1, 0.9)):
        session.apply("add", {"x": [x], "y": [y]})
    session.apply("set", {"low": -2.0, "high": 2.0, "curves": 4})
    answer, xt = session.answer(), torch.linspace(-2, 2, GRID)[:, None].double()
    predictive = by_hand(model, session).predict(xt)
    np.testing.assert_allclose(answer["x"], xt[:, 0].numpy(), atol=1e-5)
    np.testing.assert_allclose(answer["mean"], predictive.mean[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    for band, q in zip(answer["bands"], LEVELS, strict=True):
        np.testing.assert_allclose(band, predictive.quantile(q)[:, 0].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(answer["curves"], predictive.sample(4, noisy=False)[..., 0].numpy(), rtol=1e-4, atol=1e-5)
    assert answer["count"] == 3 and answer["particles"] == SAMPLES
    assert answer["elbo"] == pytest.approx(float(by_hand(model, session).elbo), rel=1e-4)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0, 6))
def test_quantiles_of_mixtures_are_where_the_distribution_function_says(count: int, seed: int, apart: float) -> None:
    rng = np.random.default_rng(seed)
    mean, std = torch.as_tensor(apart * rng.normal(size=(count, 7))), torch.as_tensor(rng.uniform(0.01, 2, (count, 7)))
    w = torch.as_tensor(rng.dirichlet(np.ones(count)))
    found = mixture_quantiles(mean, std, w)
    below = (w[:, None, None] * torch.special.ndtr((found - mean[:, None]) / std[:, None])).sum(0)
    # Between far components the distribution function is flat: there any y serves.
    torch.testing.assert_close(below, torch.tensor(LEVELS).double()[:, None].expand(-1, 7), atol=2e-3, rtol=0)


@pytest.mark.parametrize("likelihood", [StudentT(), Beta(), Heteroscedastic()], ids=lambda v: type(v).__name__)
def test_tabulated_quantiles_are_near_those_of_the_prediction(likelihood: Any) -> None:
    y = torch.tensor([[0.2], [0.9], [0.5]]).double()
    posterior = model_of(likelihood=likelihood).condition(torch.tensor([[-1.0], [0.0], [1.5]]).double(), y, num_samples=SAMPLES)
    predictive = posterior.predict(torch.linspace(-3, 3, 5)[:, None].double())
    found = tabulated_quantiles(predictive, likelihood.support)
    for edge, q in zip(found, LEVELS, strict=True):
        # The law holds for the probability; a spread says nothing where tails are heavy.
        np.testing.assert_allclose(predictive.cdf(torch.as_tensor(edge)).numpy(), q, atol=5e-3)


def test_noise_is_multiplied_in_a_copy() -> None:
    for likelihood in (Gaussian(0.3), Gaussian(0.3, max_noise_std=0.5), MultivariateGaussian(0.3)):
        model = model_of(y_dim=2, likelihood=likelihood)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        other = with_noise(model, 3.0)
        assert model.noise_std is not None and other.noise_std is not None
        torch.testing.assert_close(other.noise_std, 3 * model.noise_std)
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="Gaussian noise"):
        with_noise(model_of(likelihood=Poisson()), 2.0)


def test_more_noise_makes_the_band_wider() -> None:
    session = session_of()
    session.apply("add", {"x": [0.0], "y": [0.5]})
    narrow = session.answer()["bands"]
    session.apply("set", {"noise": 8.0})
    wide = session.answer()["bands"]
    assert all(b[3] - b[0] > a[3] - a[0] for a, b in zip(zip(*narrow, strict=True), zip(*wide, strict=True), strict=True))
    session.apply("set", {"noise": 1.0})
    assert session.answer()["bands"] == narrow


@pytest.mark.parametrize(
    ("likelihood", "given", "legal"),
    [
        (Bernoulli(), 0.7, 1.0), (Categorical(4), 7.2, 3.0), (Poisson(), -2.0, 0.0), (NegativeBinomial(), 3.4, 3.0),
        (Beta(), 1.5, 0.999), (StudentT(), 0.3, 0.3), (Heteroscedastic(), -1.0, -1.0), (Gaussian(), 9.0, 9.0),
    ],
)  # fmt: skip
def test_every_likelihood_is_shown_and_takes_legal_values(likelihood: Any, given: float, legal: float) -> None:
    for x_dim in (1, 2):
        session = session_of(model_of(x_dim, likelihood=likelihood))
        session.apply("add", {"x": [0.1] * x_dim, "y": [given]})
        assert session.state.y.tolist() == [[legal]]
        session.apply("move", {"index": 0, "x": [0.3] * x_dim, "y": [legal]})
        for mode in ("curve", "map")[:x_dim]:
            session.apply("set", {"mode": mode})
            answer = session.answer()
            json.dumps(answer, allow_nan=False)
            if mode == "map":
                assert session.subject.lattice is not None
                cells = len(session.subject.lattice.cells)
                assert len(answer["mean"]) == len(answer["std"]) == cells and np.shape(answer["samples"]) == (3, cells)
            elif isinstance(likelihood, Categorical):
                np.testing.assert_allclose(np.sum(answer["probs"], axis=0), 1, atol=1e-3)
            else:
                low, *_, high = answer["bands"]
                assert np.all(np.asarray(low) <= np.asarray(high)) and len(answer["curves"]) == session.curves
        assert isinstance(session.diagnose()["sentence"], str)


def test_outputs_that_may_be_missing_are_left_out_and_others_are_asked_for() -> None:
    session = session_of(model_of(y_dim=2, missing_outputs=True))
    session.apply("add", {"x": [0.0], "y": [0.5, None]})
    session.apply("add", {"x": [1.0], "y": [None, 0.2]})
    session.apply("set", {"output": 1})
    assert session.answer()["count"] == 2 and session.describe()["points"]["y"] == [[0.5, None], [None, 0.2]]
    with pytest.raises(ValueError, match="at least one output"):
        session.apply("add", {"x": [0.0], "y": [None, None]})
    whole = session_of(model_of(y_dim=2))
    with pytest.raises(ValueError, match="not built for missing outputs"):
        whole.apply("add", {"x": [0.0], "y": [0.5, None]})
    assert len(whole.state.x) == 0 and whole.answer()["count"] == 0


def test_other_inputs_are_held_where_they_are_said_to_be() -> None:
    model = model_of(3)
    session = session_of(model)
    session.apply("set", {"axis": 1, "held": [0.5, 9.0, -0.25], "low": -1.0, "high": 1.0})
    x = torch.full((GRID, 3), 0.5).double()
    x[:, 1], x[:, 2] = torch.linspace(-1, 1, GRID).double(), -0.25
    np.testing.assert_allclose(session.answer()["mean"], by_hand(model, session).predict(x).mean[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="two inputs for a map"):
        session.apply("set", {"mode": "map"})


def test_a_task_is_cut_into_what_is_seen_and_what_is_not() -> None:
    data = tasks_of()
    session = session_of(data=data)
    session.apply("load", {"task": 2, "share": 0.25, "seed": 5})
    state = session.state
    assert state.task == "day 2" and len(state.x) == 3 and len(state.target_x) == 9
    both = np.concatenate([state.x, state.target_x])
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(data[2][0], axis=0))
    found = session.diagnose()["score"]
    posterior = model_of().condition(torch.as_tensor(state.x), torch.as_tensor(state.y), num_samples=256)
    predictive = posterior.predict(torch.as_tensor(state.target_x))
    assert found["targets"] == 9
    assert found["log_prob"] == pytest.approx(float(predictive.log_prob(state.target_y, joint=True)) / 9, rel=1e-4)
    assert found["rmse"] == pytest.approx(float((predictive.mean - torch.as_tensor(state.target_y)).square().mean().sqrt()), rel=1e-4)
    session.apply("load", {"task": 2, "share": 0.25, "seed": 6})
    assert session.state.x.tolist() != state.x.tolist()
    session.apply("undo", {})
    assert session.state is state
    page = session.describe()  # what a page sends back is what it was sent, to the last digit
    session.apply("paint", {"x": page["points"]["x"] + page["targets"]["x"][:2], "y": page["points"]["y"] + page["targets"]["y"][:2]})
    assert len(session.state.x) == 5 and session.diagnose()["score"]["targets"] == 7


def test_scores_leave_out_what_was_not_observed() -> None:
    posterior = model_of(y_dim=2, missing_outputs=True).condition(torch.zeros(1, 1), torch.zeros(1, 2), num_samples=SAMPLES)
    x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[0.1, np.nan], [np.nan, np.nan], [0.2, 0.3]])
    found = score(posterior, x, y)
    mask = torch.tensor([[True, False], [True, True]])
    wanted = posterior.predict(x[[0, 2]]).log_prob([[0.1, 0.0], [0.2, 0.3]], joint=True, mask=mask)
    assert found["targets"] == 2 and found["log_prob"] == pytest.approx(float(wanted) / 2, rel=1e-4)


def test_painting_replaces_what_was_there() -> None:
    data = pixels_of()
    session = session_of(model_of(2), data, recipe={"kind": "images", "shape": [5, 4]})
    assert session.mode == "map"
    session.apply("paint", {"x": [[-1.0, -1.0], [1.0, 1.0]], "y": [[0.1], [0.2]], "gesture": "a"})
    session.apply("paint", {"x": [[1.0, 1.0], [1.0, 1.0]], "y": [[0.7], [0.9]], "gesture": "a"})
    assert session.state.x.tolist() == [[-1.0, -1.0], [1.0, 1.0]] and session.state.y.tolist() == [[0.1], [0.9]]
    assert session.state.conditioned == 2 and len(session.past) == 1
    answer = session.answer()
    lattice = session.subject.lattice
    assert lattice is not None
    np.testing.assert_allclose(lattice.cells, data[0][0])
    predictive = session.posterior().predict(torch.as_tensor(lattice.cells))
    np.testing.assert_allclose(answer["mean"], predictive.mean[:, 0].numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(answer["std"], predictive.std[:, 0].numpy(), rtol=1e-3)


def test_a_lattice_is_found_in_points_and_only_there() -> None:
    lat, lon = np.linspace(40, 60, 6), np.linspace(-5, 15, 9)
    x = np.stack([part.ravel() for part in np.meshgrid(lat, lon, indexing="ij")], axis=-1)
    inputs = (Column("latitude"), Column("longitude"))
    found = Lattice.of_points(x[np.random.default_rng(0).permutation(54)[:40]], inputs, "grid")
    assert found is not None and found.across == 1 and found.rows[0] == 60 and found.columns[0] == -5
    assert {tuple(row) for row in found.cells.tolist()} == {tuple(row) for row in x.tolist()}
    turned = Lattice.of_points(x[:, ::-1], inputs[::-1], "grid")
    assert turned is not None and turned.across == 0 and turned.rows[0] == 60
    np.testing.assert_array_equal(turned.cells[:, ::-1], found.cells)
    assert Lattice.of_points(np.random.default_rng(0).normal(size=(50, 2)), inputs, "table") is None
    assert Lattice.of_points(x[:3], inputs, "grid") is None
    fine = Lattice.of_range(np.zeros(2), np.ones(2), inputs, "grid", side=150)
    assert len(fine.cells) <= MOST_CELLS and fine.thinned == 3


def test_a_preview_has_fewer_particles_when_conditioning_is_slow_and_the_end_has_all() -> None:
    session = session_of()
    session.apply("set", {"samples": 64})
    session.apply("add", {"x": [0.0], "y": [0.5]})
    session._seconds_per_particle = {1: 0.05}
    session.apply("move", {"index": 0, "x": [0.1], "y": [0.5], "gesture": "g"})
    assert session.answer(preview=True)["particles"] == 8
    assert session.answer()["particles"] == 64


@pytest.mark.parametrize(
    ("verb", "body", "words"),
    [
        ("fly", {}, "among add"),
        ("add", {"x": [0.0]}, "row 0 of y"),
        ("add", {"x": [0.0, 1.0], "y": [0.0]}, "list of 1 numbers"),
        ("add", {"x": ["0"], "y": [0.0]}, "finite number"),
        ("add", {"x": [True], "y": [0.0]}, "finite number"),
        ("add", {"x": [1e40], "y": [0.0]}, "finite number"),
        ("add", {"x": [None], "y": [0.0]}, "finite number"),
        ("add", {"x": 3, "y": [0.0]}, "list of 1 numbers"),
        ("move", {"index": 1, "x": [0.0], "y": [0.0]}, "from 0 to 0"),
        ("move", {"index": 0.5, "x": [0.0], "y": [0.0]}, "whole number"),
        ("remove", {"indices": []}, "list of numbers"),
        ("remove", {"indices": "0"}, "list of numbers"),
        ("remove", {"indices": [-1]}, "from 0 to 0"),
        ("paint", {"x": [[0.0]], "y": []}, "as many rows"),
        ("paint", {"x": [[0.0]] * (MOST_POINTS + 1), "y": [[0.0]]}, "at most"),
        ("load", {"task": 0}, "nothing yet"),
        ("set", {"samples": 0}, "samples"),
        ("set", {"samples": 10**9}, "samples"),
        ("set", {"noise": -1}, "noise"),
        ("set", {"axis": 1}, "axis"),
        ("set", {"low": 2.0, "high": 1.0}, "smaller to a larger"),
        ("set", {"mode": "3-d"}, "curve, map"),
        ("set", {"held": {}}, "held"),
        ("set", {"curves": "many"}, "curves"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_was(verb: str, body: dict[str, Any], words: str) -> None:
    session = session_of()
    session.apply("add", {"x": [0.0], "y": [0.5]})
    before, settings_before = session.state, session.describe()["settings"]
    with pytest.raises(ValueError, match=words):
        session.apply(verb, body)
    assert session.state is before and session.describe()["settings"] == settings_before


def test_more_points_than_it_takes_are_refused() -> None:
    session = session_of()
    session.apply("paint", {"x": [[i / 1000] for i in range(MOST_POINTS)], "y": [[0.0]] * MOST_POINTS})
    for verb, body in (("add", {"x": [9.0], "y": [0.0]}), ("paint", {"x": [[9.0]], "y": [[0.0]]})):
        with pytest.raises(ValueError, match="at most 5000 points"):
            session.apply(verb, body)


@settings(max_examples=80)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda v: st.lists(v, max_size=3), max_leaves=8
    ),
    st.data(),
)
def test_no_json_breaks_a_session(value: Any, data: st.DataObject) -> None:
    session = session_of(data=tasks_of(2, 4))
    session.samples = 4
    verb = data.draw(st.sampled_from(["add", "move", "remove", "paint", "load", "set", "clear", "undo", "redo", "refresh"]))
    keys = [
        "x",
        "y",
        "index",
        "indices",
        "task",
        "share",
        "seed",
        "samples",
        "noise",
        "curves",
        "mode",
        "axis",
        "output",
        "low",
        "held",
        "gesture",
    ]
    body = {key: value for key in data.draw(st.lists(st.sampled_from(keys), max_size=4))}
    try:
        session.apply(verb, body)
    except ValueError as error:
        assert str(error).startswith("Expected")
    assert session.samples <= 512


def test_json_is_read_strictly_and_written_without_nan() -> None:
    assert parse(b'{"a": 1}') == {"a": 1}
    for body in (b"", b"[1]", b"{", b"\xff", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 100000):
        with pytest.raises(ValueError, match="Expected"):
            parse(body)
    assert plain(np.array([[np.inf, 1.0]])) == [[None, 1.0]] and plain(float("nan")) is None


def test_a_number_of_samples_that_cannot_be_is_refused_at_once() -> None:
    for samples in (0, 10**6):
        with pytest.raises(ValueError, match="samples from 1 to 512"):
            Explorer(Run.of(model_of()), samples=samples)


def test_values_that_vary_little_around_a_large_one_are_shown() -> None:
    model = model_of()
    rng = np.random.default_rng(0)
    tasks = [(1e6 + rng.uniform(0, 100, (20, 1)), 5e5 + rng.normal(size=(20, 1))) for _ in range(6)]
    bnnp.meta_train(model, tasks, steps=1, progress=False)
    answer = session_of(model).answer()
    assert len(set(answer["x"])) == GRID and np.ptp(answer["bands"][3]) >= 0 and len(set(np.round(answer["curves"][0], 6))) > GRID / 2


def test_tasks_are_found_by_name_and_have_to_fit() -> None:
    subject = Subject(Run.of(model_of()), tasks_of(12))
    assert [row["name"] for row in subject.names("DAY 1")["tasks"]] == ["day 1", "day 10", "day 11"]
    assert subject.names("")["found"] == 12 and subject.names("night")["tasks"] == []
    with pytest.raises(ValueError, match="2 inputs"):
        Subject(Run.of(model_of(2)), tasks_of())


# --- a server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(Explorer(Run.of(model_of(), inputs=["t"], outputs=["level"]), tasks_of(), SAMPLES)) as found:
        yield found


def ask(
    server: Server, path: str, body: bytes | None = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        given = {"Host": f"127.0.0.1:{server.port}", **({"Content-Type": "application/json"} if body is not None else {})}
        connection.request(method or ("GET" if body is None else "POST"), path, body, {**given, **headers})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def call(server: Server, verb: str, page: str = "page-one", **body: Any) -> tuple[int, dict[str, Any]]:
    status, _, found = ask(server, f"/{server.token}/api/{verb}", json.dumps({"page": page, **body}).encode())
    return status, json.loads(found)


def test_the_page_and_its_parts_are_there_and_may_load_nothing_from_elsewhere(server: Server) -> None:
    for name in ("", "app.js", "plot.js", "map.js", "link.js", "save.js", "format.js", "style.css", "icon.svg"):
        status, headers, body = ask(server, f"/{server.token}/{name}")
        assert status == 200 and len(body) > 100
        for key, value in HEADERS.items():
            assert headers[key.lower()] == value
        assert b"http://" not in body.replace(b"http://www.w3.org/", b"") and b"https://" not in body
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    for path in ("nothing.js", "../server.py", "%2e%2e/server.py", "static/app.js", "__init__.py"):
        assert ask(server, f"/{server.token}/{path}")[0] == 404


def test_a_request_without_the_token_or_from_elsewhere_is_refused(server: Server) -> None:
    token, port = server.token, server.port
    body = b'{"page": "page-one"}'
    wrong = ["/", "/app.js", "/api/open", f"/{token[:-1]}/", f"/{token}x/", "/x/", f"//{token}/", f"/{token}", "/favicon.ico"]
    for path in wrong:
        status, headers, said = ask(server, path)
        assert status == 403 and token.encode() not in said and "content-security-policy" in headers, path
        assert ask(server, path, body)[0] == 403
    for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1:{port + 1}", f"127.0.0.1.evil.example:{port}", "127.0.0.1"):
        assert ask(server, f"/{token}/", Host=host)[0] == 403, host
    assert ask(server, f"/{token}/api/open", body, Origin="http://evil.example")[0] == 403
    for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
        assert ask(server, f"/{token}/", Host=host)[0] == 200
        assert ask(server, f"/{token}/api/open", body, Host=host, Origin=f"http://{host}")[0] == 200
    assert len(token) >= 32


def test_it_listens_on_this_machine_only(server: Server) -> None:
    assert server._socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.port}/{server.token}/"


@pytest.mark.parametrize(
    ("verb", "body", "status"),
    [
        ("open", b"", 400), ("open", b"[]", 400), ("open", b"{", 400), ("open", b'{"page": 3}', 400), ("open", b'{"page": "x"}', 400),
        ("open", b'{"page": "../../../../etc"}', 400), ("open", b'{"page": "page-one", "seq": -1}', 400),
        ("change", b'{"page": "page-one"}', 400), ("change", b'{"page": "page-one", "do": "add", "x": [NaN], "y": [0]}', 400),
        ("change", b'{"page": "page-one", "do": "add", "x": [1e999], "y": [0]}', 400),
        ("change", b'{"page": "page-one", "do": "__class__"}', 400), ("nothing", b'{"page": "page-one"}', 404),
        ("change", b'{"page": "page-one", "do": "clear", "pad": "' + b" " * MOST_BYTES + b'"}', 413),
    ],
)  # fmt: skip
def test_a_bad_request_is_answered_with_what_was_expected(server: Server, verb: str, body: bytes, status: int) -> None:
    found, _, said = ask(server, f"/{server.token}/api/{verb}", body)
    assert found == status and json.loads(said)["error"].startswith("Expected")


def test_other_methods_and_types_are_refused(server: Server) -> None:
    path = f"/{server.token}/api/open"
    assert ask(server, path)[0] == 405 and ask(server, path, b"{}", "PUT")[0] == 405 and ask(server, f"/{server.token}/", b"{}")[0] == 405
    assert ask(server, path, b'{"page": "page-one"}', **{"Content-Type": "text/plain"})[0] == 415


def test_a_body_without_end_is_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        head = f"POST /{server.token}/api/open HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        line.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        chunk = b"%x\r\n" % 2**16 + b" " * 2**16 + b"\r\n"
        try:
            for _ in range(MOST_BYTES // 2**16 + 2):
                line.sendall(chunk)
        except OSError:
            pass  # it hung up
        assert b" 413 " in line.recv(200)


def test_two_pages_do_not_disturb_each_other_and_a_reload_finds_the_state(server: Server) -> None:
    call(server, "change", "page-left", do="clear")
    call(server, "change", "page-right", do="clear")
    threads = [
        threading.Thread(target=lambda p=page, v=value: [call(server, "change", p, do="add", x=[i / 5], y=[v]) for i in range(4)])
        for page, value in (("page-left", 1.0), ("page-right", -1.0))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for page, value in (("page-left", 1.0), ("page-right", -1.0)):
        status, found = call(server, "open", page, seq=7)
        assert status == 200 and found["seq"] == 7
        assert found["state"]["points"] == {"x": [[0.0], [0.2], [0.4], [0.6]], "y": [[value]] * 4}
    assert call(server, "open", "page-left")[1]["answer"]["mean"] == call(server, "open", "page-left")[1]["answer"]["mean"]


def test_a_change_that_is_sent_twice_is_made_once(server: Server) -> None:
    call(server, "change", "page-twice", do="add", x=[0.0], y=[0.0], mark="a")
    assert call(server, "change", "page-twice", do="add", x=[0.0], y=[0.0], mark="a")[1]["count"] == 1
    assert call(server, "change", "page-twice", do="add", x=[0.0], y=[0.0], mark="b")[1]["count"] == 2


def test_tasks_and_diagnosis_are_answered(server: Server) -> None:
    assert call(server, "tasks", search="day 3")[1]["tasks"] == [{"task": 3, "name": "day 3", "size": 12}]
    status, found = call(server, "change", "page-task", do="load", task=3, share=0.5, seed=1)
    assert status == 200 and found["count"] == 6 and len(found["state"]["targets"]["x"]) == 6
    status, found = call(server, "diagnose", "page-task", seq=3)
    assert status == 200 and found["seq"] == 3 and found["score"]["targets"] == 6 and found["particles"] == 256


def test_pages_that_nobody_uses_are_forgotten() -> None:
    explorer = Explorer(Run.of(model_of()), samples=4)
    explorer.handle("change", {"page": "page-old", "do": "add", "x": [0.0], "y": [0.0]})
    for i in range(MOST_PAGES):
        explorer.handle("open", {"page": f"page-{i:04d}"})
    assert explorer.handle("open", {"page": "page-old"})["state"]["points"]["x"] == []


def test_a_failure_of_ours_is_an_answer_and_not_a_silence(server: Server, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(server.explorer, "handle", broken)
    status, found = call(server, "open")
    assert status == 500 and "RuntimeError: out of luck" in found["error"]
    assert "Traceback" in capfd.readouterr().err


def test_a_port_in_use_is_one_clear_error(server: Server) -> None:
    with pytest.raises(OSError, match=f"Expected a free port on 127.0.0.1. Got {server.port}.*--port 0"):
        Server(server.explorer, server.port)
    for port in (-1, 70000, "80", True):
        with pytest.raises(ValueError, match="Expected port"):
            Server(server.explorer, port)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Expected a free port"):
        explore(Run.of(model_of()), port=server.port, open_browser=False)


def test_explore_says_where_it_is_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    model_of().save(tmp_path)
    source = Path(bnnp.__file__).parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(source)!r}); from bnnp.explorer import explore; from bnnp.runs import Run; "
        f"explore(Run.open({str(tmp_path)!r}), open_browser=False, announce=lambda w: print(w, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Explore at http://127.0.0.1:")
        port, token = int(line.split(":")[2].split("/")[0]), line.strip().split("/")[3]
        deadline = time.monotonic() + 20
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", f"/{token}/")
                assert connection.getresponse().status == 200
                connection.close()
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and "Stopped." in out and err == ""


def test_without_the_server_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"bnnp\[explore\]"):
        Server(Explorer(Run.of(model_of())))
