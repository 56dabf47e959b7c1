"""What is exported is what the posterior says, in its place and under its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnnp
from bnnp.data.collection import Column
from bnnp.data.grids import read_grid
from bnnp.export import predict_dataset, to_arviz
from bnnp.runs import Run

xarray = pytest.importorskip("xarray")


def fields(times: int = 3, outputs: tuple[str, ...] = ("t2m",)) -> Any:
    """Return fields of latitude and longitude with attributes, some cells missing."""
    rng = np.random.default_rng(0)
    ds = xarray.Dataset(
        {
            name: (("time", "lat", "lon"), 280 + 5 * rng.normal(size=(times, 4, 5)), {"units": "K", "long_name": "warmth"})
            for name in outputs
        },
        {
            "time": np.datetime64("2024-01-01") + np.arange(times),
            "lat": ("lat", [40.0, 42, 44, 46], {"units": "degrees_north"}),
            "lon": ("lon", [0.0, 1, 2, 3, 4], {"units": "degrees_east"}),
        },
        {"title": "made up"},
    )
    return ds.where(rng.random((times, 4, 5)) < 0.4)


def run_of(ds: Any, **options: Any) -> Run:
    recipe = read_grid(ds, **options).recipe
    model = bnnp.BNNP(len(recipe["inputs"]), len(recipe["outputs"]), hidden=(6,), prior=bnnp.Prior(spread=0.9)).double()
    model.fit_scaling([bnnp.Task(torch.randn(30, model.x_dim).double() * 3 + 20, 280 + 5 * torch.randn(30, model.y_dim).double())])
    return Run.of(model, recipe=recipe, inputs=recipe["inputs"], outputs=[Column(name, "K") for name in recipe["outputs"]])


@pytest.fixture(autouse=True)
def fixed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_every_cell_is_what_the_posterior_of_its_field_says() -> None:
    ds = fields()
    run = run_of(ds)
    out = predict_dataset(run, ds, quantiles=(0.05, 0.5, 0.975), samples=3, seed=2, num_samples=8)
    assert set(out.data_vars) == {"t2m_mean", "t2m_std", "t2m_q05", "t2m_q50", "t2m_q97_5", "t2m_sample"}
    assert out.t2m_mean.dims == ds.t2m.dims and out.t2m_sample.dims == ("sample", *ds.t2m.dims)
    assert out.t2m_mean.attrs["units"] == out.t2m_q05.attrs["units"] == "K" and out.attrs == ds.attrs
    assert out.lat.attrs == ds.lat.attrs
    for name in ("time", "lat", "lon"):
        np.testing.assert_array_equal(out[name], ds[name])
    lat, lon = (a.ravel() for a in np.meshgrid(ds.lat, ds.lon, indexing="ij"))
    x = np.column_stack([lat, lon])
    for i in range(3):
        y = ds.t2m.values[i].ravel()
        seen = ~np.isnan(y)
        predictive = run.model.condition(x[seen], y[seen], num_samples=8, seed=2).predict(x)
        for name, want in (("mean", predictive.mean), ("std", predictive.std), ("q97_5", predictive.quantile(0.975))):
            np.testing.assert_allclose(out[f"t2m_{name}"].values[i].ravel(), want[:, 0], rtol=1e-12)
        np.testing.assert_allclose(out.t2m_sample.values[:, i].reshape(3, -1), predictive.sample(3, seed=2)[..., 0], rtol=1e-12)


def test_targets_may_be_another_grid() -> None:
    ds = fields(times=2)
    run = run_of(ds)
    fine = xarray.Dataset(coords={"lat": ds.lat[1:3], "lon": ("lon", [0.0, 0.5, 1.0])})
    out = predict_dataset(run, ds, targets=fine, num_samples=8)
    assert dict(out.sizes) == {"time": 2, "lat": 2, "lon": 3}
    whole = predict_dataset(run, ds, num_samples=8)
    np.testing.assert_allclose(out.t2m_mean.sel(lon=[0, 1]), whole.t2m_mean.sel(lat=fine.lat, lon=[0, 1]), rtol=1e-12)
    # What stands in the targets is not looked at.
    again = predict_dataset(run, ds, targets=ds.assign(t2m=ds.t2m * 0 + 1e6), num_samples=8)
    xarray.testing.assert_allclose(again, whole)


def test_one_field_without_the_dimension_of_the_task_and_one_without_observations() -> None:
    ds = fields()
    run = run_of(ds)
    out = predict_dataset(run, ds.isel(time=1), num_samples=8)
    assert out.t2m_mean.dims == ("lat", "lon") and out.time.ndim == 0
    np.testing.assert_allclose(out.t2m_mean, predict_dataset(run, ds, num_samples=8).t2m_mean[1], rtol=1e-12)
    kept = predict_dataset(run, ds.isel(time=[1]), num_samples=8)
    assert kept.t2m_mean.dims == ("time", "lat", "lon")
    empty = predict_dataset(run, ds.isel(time=1).drop_vars("t2m"), num_samples=8)
    x = np.stack(np.meshgrid(ds.lat, ds.lon, indexing="ij"), -1).reshape(-1, 2)
    prior = run.model.condition(np.zeros((0, 2)), np.zeros((0, 1)), num_samples=8).predict(x)
    np.testing.assert_allclose(empty.t2m_std.values.ravel(), prior.std[:, 0], rtol=1e-12)
    array = predict_dataset(run, ds.t2m.isel(time=1), num_samples=8)
    np.testing.assert_allclose(array.t2m_mean, out.t2m_mean)


def test_several_outputs_have_variables_of_their_own() -> None:
    ds = fields(outputs=("t2m", "d2m"))
    run = run_of(ds, outputs=["t2m", "d2m"])
    out = predict_dataset(run, ds, num_samples=8)
    assert {"t2m_mean", "d2m_mean", "d2m_q95"} <= set(out.data_vars)
    assert not np.allclose(out.t2m_mean, out.d2m_mean)
    with pytest.raises(ValueError, match="missing_outputs"):
        predict_dataset(run, ds.assign(d2m=ds.d2m.where(ds.lat > 43)), num_samples=8)


def test_a_day_of_hours_is_one_field() -> None:
    rng = np.random.default_rng(0)
    ds = xarray.Dataset(
        {"v": (("time", "lat"), rng.normal(280, 5, size=(48, 3)))},
        {"time": np.datetime64("2024-01-01T00") + np.arange(48) * np.timedelta64(1, "h"), "lat": [1.0, 2, 3]},
    )
    run = run_of(ds, task="time:1D")
    out = predict_dataset(run, ds.isel(time=slice(0, 24)).where(ds.lat < 2), num_samples=8)
    assert dict(out.sizes) == {"time": 24, "lat": 3} and bool(out.v_mean.notnull().all())
    with pytest.raises(ValueError, match="one field"):
        predict_dataset(run, ds)


def test_the_result_can_be_written_and_read(tmp_path: Path) -> None:
    pytest.importorskip("netCDF4")
    ds = fields()
    out = predict_dataset(run_of(ds), ds, num_samples=8)
    out.to_netcdf(tmp_path / "out.nc")
    with xarray.open_dataset(tmp_path / "out.nc") as back:
        xarray.testing.assert_allclose(back.load(), out)


def test_other_models_and_wrong_requests_are_refused() -> None:
    ds = fields()
    with pytest.raises(ValueError, match="learned from grids"):
        predict_dataset(Run.of(bnnp.BNNP(2, 1, hidden=(4,))), ds)
    run = run_of(ds)
    with pytest.raises(ValueError, match="quantiles"):
        predict_dataset(run, ds, quantiles=(5,))
    with pytest.raises(ValueError, match="as many fields"):
        predict_dataset(run, ds, targets=ds.isel(time=[0, 1]))


# --- ArviZ

KINDS: dict[str, tuple[Any, Any]] = {
    "gaussian": (bnnp.Gaussian(), np.array([1.0, 2.0, 4.0])),
    "student": (bnnp.StudentT(), np.array([1.0, 2.0, 4.0])),
    "heteroscedastic": (bnnp.Heteroscedastic(), np.array([1.0, 2.0, 4.0])),
    "counts": (bnnp.Poisson(), np.array([1.0, 0.0, 4.0])),
    "classes": (bnnp.Categorical(3), np.array([2.0, 0.0, 1.0])),
}


def posterior_of(kind: str, hidden: tuple[int, ...] = (5, 4)) -> Any:
    likelihood, y = KINDS[kind]
    model = bnnp.BNNP(2, 1, hidden=hidden, likelihood=likelihood).double()
    rng = np.random.default_rng(0)
    tasks = [bnnp.Task(torch.tensor(rng.normal(3, 2, size=(9, 2))), torch.tensor(rng.permutation(np.resize(y, 9))[:, None]))]
    model.fit_scaling(tasks)
    return model.condition(rng.normal(size=(3, 2)), y[:, None], num_samples=6), rng.normal(size=(4, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_those_of_the_posterior(kind: str) -> None:
    pytest.importorskip("arviz")
    posterior, xt = posterior_of(kind)
    data = to_arviz(posterior, xt, num_samples=10, seed=4)
    weights = posterior.sample_weights(10, seed=4)
    assert len(weights) == 3
    for i, W in enumerate(weights):
        found = data.posterior[f"W{i}"]
        assert found.dims == ("chain", "draw", f"unit{i}", f"input{i}") and found.shape[0] == 1
        np.testing.assert_array_equal(found[0], W)
        np.testing.assert_array_equal(data.prior[f"W{i}"][0].shape, W.shape)
    assert data.posterior.input1.values.tolist() == [*(f"unit {j}" for j in range(5)), "bias"]
    f = np.stack([function(xt).numpy() for function in posterior.sample_functions(10, seed=4)])
    if kind == "classes":  # functions give logits, the export probabilities
        f = torch.as_tensor(f).softmax(-1).numpy()
    np.testing.assert_allclose(data.posterior["f"][0], f, rtol=1e-12)
    np.testing.assert_allclose(data.prior["f"][0], posterior.model.prior_samples(xt, 10, seed=4), rtol=1e-12)
    assert data.predictions["y"].dims == ("chain", "draw", "point", "output") and data.predictions["y"].shape == (1, 10, 4, 1)
    np.testing.assert_array_equal(data.predictions_constant_data["x"], xt)
    np.testing.assert_allclose(data.observed_data["y"][:, 0], KINDS[kind][1])
    np.testing.assert_allclose(data.constant_data["x"], posterior.kept[0].x[0])


@pytest.mark.parametrize("kind", ["gaussian", "counts", "student"])
def test_log_likelihood_is_the_density_of_y_given_the_drawn_function(kind: str) -> None:
    pytest.importorskip("arviz")
    posterior, _ = posterior_of(kind)
    y, x = torch.tensor(KINDS[kind][1]), posterior.kept[0].x[0]
    found = torch.tensor(to_arviz(posterior, num_samples=7, seed=1).log_likelihood["y"].values[0])
    f = torch.stack([function(x) for function in posterior.sample_functions(7, seed=1)])[..., 0]
    likelihood, scale = posterior.likelihood, posterior.scaling.y_scale.double()
    if kind == "gaussian":
        want = torch.distributions.Normal(f, likelihood.noise_std.detach() * scale).log_prob(y)
    elif kind == "student":
        part = likelihood.torch_distribution(posterior.scaling.y(f.unsqueeze(-1)), scale, posterior.scaling.y_shift)
        want = part[0](**part[1]).log_prob(y.unsqueeze(-1)).squeeze(-1)
    else:
        want = torch.distributions.Poisson(f).log_prob(y)
    torch.testing.assert_close(found, want.detach(), rtol=1e-9, atol=1e-9)


def test_predictions_scatter_around_the_function_by_the_noise() -> None:
    pytest.importorskip("arviz")
    posterior, xt = posterior_of("gaussian")
    data = to_arviz(posterior, xt, num_samples=4000)
    rest = (data.predictions["y"] - data.posterior["f"]).values.ravel()
    noise = float(posterior.model.noise_std)
    assert abs(rest.std() / noise - 1) < 0.05 and abs(rest.mean()) < 0.05 * noise
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "observation", "output")
    assert data.posterior_predictive["y"].shape == data.prior_predictive["y"].shape == (1, 4000, 3, 1)


def test_arviz_can_work_with_it() -> None:
    arviz = pytest.importorskip("arviz")
    posterior, xt = posterior_of("gaussian")
    data = to_arviz(posterior, xt, num_samples=50)
    assert isinstance(data, getattr(arviz, "InferenceData", xarray.DataTree))
    assert arviz.summary(data, var_names=["f"], kind="stats").shape[0] == 4


def test_later_versions_of_arviz_get_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    arviz = pytest.importorskip("arviz")
    monkeypatch.delattr(arviz, "InferenceData", raising=False)
    posterior, xt = posterior_of("gaussian")
    data = to_arviz(posterior, xt, num_samples=5)
    assert isinstance(data, xarray.DataTree) and data["posterior/f"].shape == (1, 5, 4, 1)
    assert data["posterior"].attrs["inference_library"] == "bnnp"


def test_names_come_from_the_run() -> None:
    pytest.importorskip("arviz")
    posterior, xt = posterior_of("gaussian")
    run = Run.of(posterior.model, inputs=["dose", "age"], outputs=["level"])
    data = to_arviz(posterior, xt, num_samples=5, run=run)
    assert data.posterior.input0.values.tolist() == ["dose", "age", "bias"] and data.observed_data.output.values.tolist() == ["level"]


def test_points_that_were_masked_or_streamed_are_left_out() -> None:
    pytest.importorskip("arviz")
    model = bnnp.BNNP(1, 2, hidden=(4,), missing_outputs=True).double()
    mask = np.array([[True, True], [False, False], [True, False]])
    posterior = model.condition(np.ones((3, 1)), np.arange(6.0).reshape(3, 2), mask=mask, num_samples=4)
    data = to_arviz(posterior, num_samples=5)
    np.testing.assert_array_equal(data.observed_data["y"], [[0, 1], [4, np.nan]])
    f = torch.stack([function(np.ones((1, 1))) for function in posterior.sample_functions(5)])[:, 0]
    noise = model.noise_std
    want = torch.distributions.Normal(f, noise).log_prob(torch.tensor([4.0, 0.0]))[:, 0]
    np.testing.assert_allclose(data.log_likelihood["y"][0, :, 1], want, rtol=1e-9)
    streamed = model.condition(lambda: iter([(np.ones((2, 1)), np.ones((2, 2)))]), num_samples=4)
    assert set(to_arviz(streamed, num_samples=5).groups()) == {"posterior", "prior", "constant_data"}
    empty = model.condition(np.zeros((0, 1)), np.zeros((0, 2)), num_samples=4)
    assert set(to_arviz(empty, num_samples=5).groups()) == {"posterior", "prior", "constant_data"}


def test_batches_of_tasks_are_refused() -> None:
    model = bnnp.BNNP(1, 1, hidden=(4,))
    with pytest.raises(ValueError, match="one task"):
        to_arviz(model.condition(np.zeros((2, 3, 1)), np.zeros((2, 3, 1)), num_samples=4))
