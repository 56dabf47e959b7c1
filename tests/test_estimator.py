"""The estimator says what `meta_train` and `condition` say, and behaves as scikit-learn expects."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

import bnnp

sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from bnnp.estimator import BNNPRegressor  # noqa: E402

Arrays = tuple[Any, Any, Any]


def lines(groups: int = 12, rows: int = 8, seed: int = 0) -> Arrays:
    """Return rows of lines with slopes of their own, two inputs of which one is constant, shuffled."""
    rng = np.random.default_rng(seed)
    label = np.repeat([f"group {i}" for i in range(groups)], rows)
    x = rng.uniform(-1, 1, size=groups * rows)
    y = np.repeat(rng.normal(size=groups), rows) * x + 0.05 * rng.normal(size=groups * rows)
    order = rng.permutation(groups * rows)
    return np.column_stack([x, np.full_like(x, 3.0)])[order], y[order], label[order]


def small(**options: Any) -> BNNPRegressor:
    return BNNPRegressor(**{"hidden": (6,), "steps": 15, "num_samples": 8, "random_state": 0, **options})


@pytest.fixture(scope="module")
def fitted() -> BNNPRegressor:
    X, y, groups = lines()
    return small(steps=150).fit(X, y, groups=groups)


def test_it_passes_the_checks_of_scikit_learn() -> None:
    results = check_estimator(small(steps=5), on_fail=None, on_skip=None)
    failed = {r["check_name"]: repr(r["exception"]) for r in results if r["status"] not in ("passed", "skipped")}
    assert failed == {}
    assert [r["check_name"] for r in results if r["status"] == "skipped"] in ([], ["check_array_api_input"])


def test_the_package_offers_it_without_loading_scikit_learn() -> None:
    assert bnnp.BNNPRegressor is BNNPRegressor
    with pytest.raises(AttributeError, match="has no attribute 'BNNPClassifier'"):
        _ = bnnp.BNNPClassifier


def test_rows_of_known_groups_are_answered_by_the_posterior_of_that_group(fitted: BNNPRegressor) -> None:
    X, y, groups = lines()
    new = np.array([[0.3, 3.0], [-0.7, 9.0], [0.9, 3.0], [0.1, 3.0]])
    labels = ["group 5", "elsewhere", "group 2", "group 5"]
    mean, std = fitted.predict(new, groups=labels, return_std=True)
    quantiles = fitted.predict_quantiles(new, (0.1, 0.8), groups=labels)
    density = fitted.log_predictive_density(new, [0.1, 0.2, 0.3, 0.4], groups=labels)
    for i, label in enumerate(labels):
        own = groups == label
        posterior = fitted.model_.condition(X[own, :1], y[own, None], num_samples=8, seed=fitted.seed_)
        p = posterior.predict(new[i : i + 1, :1])
        want = [p.mean, p.std, p.quantile(0.1), p.quantile(0.8), p.log_prob([[0.1 * (i + 1)]])]
        got = [mean[i], std[i], *quantiles[i], density[i]]
        np.testing.assert_allclose(got, [float(value) for value in want], rtol=1e-9, atol=1e-12)


def test_many_groups_at_once_are_the_groups_one_by_one() -> None:
    X, y, groups = lines(groups=20)
    uneven = np.concatenate([np.flatnonzero(groups == f"group {i}")[: 2 + i % 6] for i in range(20)])
    model = small().fit(X[uneven], y[uneven], groups=groups[uneven])
    together = model.predict(X, groups=groups)
    for label in np.unique(groups):
        own = groups == label
        np.testing.assert_allclose(together[own], model.predict(X[own], groups=groups[own]), rtol=1e-9, atol=1e-12)
    draws = model.sample_y(X, 3, groups=groups)
    own = groups == "group 7"
    np.testing.assert_allclose(draws[own], model.sample_y(X[own], 3, groups=groups[own]), rtol=1e-9, atol=1e-12)


def test_groups_teach_a_prior_that_helps_a_new_one(fitted: BNNPRegressor) -> None:
    X, y, groups = lines(groups=3, rows=20, seed=7)
    gains = []
    for label in np.unique(groups):
        own = np.flatnonzero(groups == label)
        new = fitted.condition(X[own[:5]], y[own[:5]])
        densities = (model.log_predictive_density(X[own[5:]], y[own[5:]]).mean() for model in (new, fitted))
        gains.append(next(densities) - next(densities))
    assert np.mean(gains) > 0.3
    as_groups = fitted.condition(X, y, groups=groups)
    assert as_groups.groups_ == fitted.groups_ and "group 0" in as_groups.groups_
    own = groups == "group 1"
    alone = fitted.condition(X[own], y[own])
    np.testing.assert_allclose(as_groups.predict(X[own], groups=groups[own]), alone.predict(X[own]), rtol=1e-9)
    # A group that was known is replaced, in the copy only.
    assert len(fitted.contexts_["group 1"][0]) == 8 and len(as_groups.contexts_["group 1"][0]) == 20


def test_one_data_set_is_regressed_under_a_prior_that_is_held() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 2))
    y = X @ [1.0, -2.0] + 0.1 * rng.normal(size=60)
    model = small(steps=60).fit(X, y)
    assert all(not p.requires_grad for p in (*model.model_.prior.means(), *model.model_.prior.scales()))
    fresh = bnnp.BNNP(2, 1, hidden=(6,), prior="matrix_normal").double()
    states = ({k: v for k, v in m.state_dict().items() if ".prior." in k} for m in (model.model_, fresh))
    for (name, held), (_, start) in zip(*(sorted(state.items()) for state in states), strict=True):
        np.testing.assert_array_equal(held.numpy(), start.numpy(), err_msg=name)
    want = model.model_.condition(X, y[:, None], num_samples=8, seed=model.seed_).predict(X)
    np.testing.assert_allclose(model.predict(X), want.mean[:, 0].numpy(), rtol=1e-12)
    new = rng.normal(size=(40, 2))
    assert model.score(new, new @ [1.0, -2.0]) > 0.9
    with pytest.raises(ValueError, match="fitted without"):
        model.predict(X, groups=np.zeros(60))
    assert model.condition(X[:5], y[:5]).posterior_.counts.item() == 5


def test_a_large_data_set_is_learned_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnnp.estimator.PART", 7)
    from bnnp.estimator import _parts

    X, Y = np.arange(20.0)[:, None], np.arange(20.0)[:, None]
    parts = _parts(X, Y, seed=1)
    assert [len(x) for x, _ in parts] == [7, 7, 6] and sorted(np.concatenate([x for x, _ in parts])[:, 0]) == list(range(20))
    assert [len(x) for x, _ in _parts(X[:5], Y[:5], 0)] == [5, 5]


def test_the_same_random_state_gives_the_same_fit_and_none_another() -> None:
    X, y, groups = lines(groups=4)
    first, again = (
        small(random_state=state).fit(X, y, groups).predict(X) for state in (np.random.RandomState(3), np.random.RandomState(3))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, small(random_state=4).fit(X, y, groups).predict(X))
    free = small(random_state=None)
    assert not np.array_equal(free.fit(X, y, groups).predict(X), free.fit(X, y, groups).predict(X))


def test_shapes_follow_y() -> None:
    X, y, groups = lines(groups=4)
    Y = np.column_stack([y, 2 * y + 1])
    both = small().fit(X, Y, groups=groups)
    assert both.predict(X).shape == both.predict(X, groups=groups, return_std=True)[1].shape == (32, 2)
    assert both.predict_quantiles(X, (0.1, 0.5, 0.9)).shape == (32, 2, 3)
    assert both.sample_y(X, 5).shape == (32, 2, 5)
    assert both.log_predictive_density(X, Y, groups).shape == (32,)
    one = small().fit(X, y, groups=groups)
    assert one.sample_y(X, 5).shape == (32, 5) and one.predict_quantiles(X).shape == (32, 3)
    with pytest.raises(ValueError, match="1 column"):
        one.condition(X, Y)


def test_a_draw_is_one_function_and_has_the_moments_of_the_prediction(fitted: BNNPRegressor) -> None:
    model = bnnp.BNNPRegressor(**{**fitted.get_params(), "steps": 1, "num_samples": 400}).fit(*lines()[:2])
    X = lines()[0][:6]
    draws, (mean, std) = model.sample_y(X, 400, random_state=1), model.predict(X, return_std=True)
    np.testing.assert_allclose(draws.mean(-1), mean, atol=5 * std.max() / 20)
    np.testing.assert_allclose(draws.std(-1), std, rtol=0.25)
    clean = model.sample_y(X, 3, noisy=False)
    np.testing.assert_array_equal(clean, model.sample_y(X, 3, noisy=False))
    np.testing.assert_array_equal(clean, model.sample_y(np.tile(X, (2, 1)), 3, noisy=False)[:6])


def test_single_precision_stays_single() -> None:
    X, y, groups = lines(groups=4)
    model = small().fit(X.astype(np.float32), y, groups=groups)
    assert model.predict(X.astype(np.float32)).dtype == np.float32 and model.model_.dtype.is_floating_point
    double = small().fit(X, y, groups=groups)
    assert double.predict(X).dtype == np.float64
    np.testing.assert_allclose(model.predict(X.astype(np.float32), groups), double.predict(X, groups), atol=0.05)


def test_it_can_be_pickled_and_cloned(fitted: BNNPRegressor) -> None:
    X, _, groups = lines()
    back = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(back.predict(X, groups), fitted.predict(X, groups))
    other = clone(small(prior=bnnp.Prior("diagonal", tied=True), likelihood=bnnp.StudentT()))
    assert other.prior == bnnp.Prior("diagonal", tied=True) and not hasattr(other, "model_")
    X, y, groups = lines(groups=4)
    assert np.isfinite(other.fit(X, y, groups).predict(X, groups)).all()


def test_cross_validation_by_groups_scores_new_groups() -> None:
    X, y, groups = lines()
    model = make_pipeline(StandardScaler(), small())
    plain = cross_val_score(model, X, y, groups=groups, cv=GroupKFold(3), params={"bnnpregressor__groups": groups})
    # The same by hand: held-out groups have no points, so the prior answers.
    by_hand = []
    for train, test in GroupKFold(3).split(X, y, groups):
        scaler = StandardScaler().fit(X[train])
        by_hand.append(small().fit(scaler.transform(X[train]), y[train], groups[train]).score(scaler.transform(X[test]), y[test]))
    np.testing.assert_allclose(plain, by_hand, rtol=1e-9)


def test_groups_are_routed_to_fit_and_score() -> None:
    X, y, groups = lines(groups=6, rows=10)
    with sklearn.config_context(enable_metadata_routing=True):
        model = small(steps=40).set_fit_request(groups=True).set_score_request(groups=True)
        search = GridSearchCV(model, {"hidden": [(4,), (6,)]}, cv=KFold(2, shuffle=True, random_state=0)).fit(X, y, groups=groups)
    assert search.best_estimator_.groups_ == list(dict.fromkeys(groups.tolist()))
    # Rows of a group were divided, so scores are of groups of which half is known.
    train, test = next(KFold(2, shuffle=True, random_state=0).split(X))
    own = small(steps=40, hidden=(4,)).fit(X[train], y[train], groups[train])
    assert search.cv_results_["split0_test_score"][0] == pytest.approx(own.score(X[test], y[test], groups=groups[test]), rel=1e-9)
    assert own.score(X[test], y[test], groups=groups[test]) > own.score(X[test], y[test])


def test_names_of_columns_are_kept() -> None:
    pandas = pytest.importorskip("pandas")
    X, y, groups = lines(groups=4)
    frame = pandas.DataFrame(X, columns=["dose", "constant"])
    model = small().fit(frame, pandas.Series(y), groups=pandas.Series(groups, dtype="category"))
    assert model.feature_names_in_.tolist() == ["dose", "constant"] and model.kept_features_.tolist() == [True, False]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"dose": "other"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": ["a"] * 31}, "one label for each of the 32 rows"),
        ({"groups": [None] * 32}, "group for every row"),
        ({"groups": np.arange(32)}, "at least 2 groups of 2 rows"),
        ({"groups": np.zeros(32)}, "at least 2 groups of 2 rows"),
        ({"X": np.ones((32, 2))}, "a column of X that varies"),
        ({"y": np.ones(32)}, "column of y to vary"),
        ({"y": np.full(32, np.nan)}, "NaN"),
        ({"model": {"likelihood": bnnp.Bernoulli()}}, "this is a regressor"),
        ({"model": {"validation_fraction": 1.5}}, "validation_fraction"),
        ({"model": {"num_samples": 0}}, "num_samples"),
        ({"model": {"prior": "unknown"}}, "Expected a prior among"),
        ({"model": {"steps": 0}}, "steps"),
        ({"model": {"learning_rate": -1.0}}, "learning_rate"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    X, y, groups = lines(groups=4)
    given = {"X": X, "y": y, "groups": groups, **change}
    with pytest.raises(ValueError, match=words):
        small(**given.pop("model", {})).fit(**given)


def test_it_has_to_be_fitted_first() -> None:
    with pytest.raises(NotFittedError):
        small().predict(np.ones((2, 1)))
    with pytest.raises(NotFittedError):
        small().condition(np.ones((2, 1)), np.ones(2))


@pytest.mark.slow
def test_a_prior_learned_from_pieces_of_one_data_set_is_too_sure() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    train, test = order[:300], order[300:]
    held = BNNPRegressor(steps=300, random_state=0).fit(X[train], y[train])
    pieces = BNNPRegressor(steps=300, random_state=0).fit(X[train], y[train], groups=np.arange(300) // 50)
    shares = []
    for model in (held, pieces.condition(X[train], y[train])):
        low, high = model.predict_quantiles(X[test], (0.05, 0.95)).T
        shares.append(np.mean((low < y[test]) & (y[test] < high)))
    assert 0.84 < shares[0] < 0.96 and shares[1] < 0.6
    assert held.score(X[test], y[test]) > 0.38
