"""Posteriors in the languages of others: fields in and fields out for xarray, draws for ArviZ.

Both return values in the units of the data, under the names that a `Run` remembers. Nothing is computed here that `Posterior` and
`Predictive` do not give.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from bnnp.data.grids import grid_dataset, grid_points
from bnnp.data.sources import open_dataset
from bnnp.linalg import to_compute
from bnnp.networks import BNNP
from bnnp.posterior import Posterior
from bnnp.predictive import Predictive
from bnnp.runs import Run
from bnnp.seeds import check_count, seeded
from bnnp.tasks import Context, check_inputs

__all__ = ["level_name", "predict_dataset", "to_arviz"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


# --- xarray in, xarray out


def predict_dataset(
    run: Run,
    ds: Any,
    targets: Any = None,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    samples: int = 0,
    seed: int = 0,
    num_samples: int = 64,
) -> Any:
    """Complete fields: condition on the cells that were observed and predict all cells, or those of another grid.

    Arguments:
        run: of a model that was learned from grids.
        ds: an `xarray.Dataset` or `DataArray`, or the path of one, with the inputs of the model; cells of its outputs that are NaN, and
            outputs that it lacks, are not observed. One field, or several along a dimension of the task, each on its own.
        targets: a grid to predict on, likewise; its outputs are not looked at. Where None, that of `ds`.
        quantiles: which to return.
        samples: number of draws of the field, noise included.
        seed: of the particles and draws.
        num_samples: number of particles.

    Returns:
        An `xarray.Dataset` on the grid of the targets with, for an output t2m, t2m_mean, t2m_std (noise included), t2m_q05 and so on, and
        with `samples`, t2m_sample with the dimension "sample". Units, names and attributes are those of the outputs.

    Raises:
        ValueError: the model was not learned from grids, or an input is missing.

    Example:
        >>> import xarray
        >>> from bnnp.data.grids import read_grid
        >>> ds = xarray.Dataset({"t": (("time", "lat"), [[1.0, np.nan]])}, {"time": [0], "lat": [10.0, 20.0]})
        >>> predict_dataset(Run.of(BNNP(1, 1, hidden=(4,)), recipe=read_grid(ds).recipe), ds).t_mean.shape
        (1, 2)
    """
    if run.kind != "grid":
        raise ValueError(f"Expected the run of a model that was learned from grids. Got one of kind {run.kind!r}. Use model.condition.")
    for q in quantiles:
        if not 0 < q < 1:
            raise ValueError(f"Expected quantiles between 0 and 1. Got {q!r}.")
    ds, _ = open_dataset(ds)
    grid = ds if targets is None else open_dataset(targets)[0]
    order = [str(d) for d in grid.dims]
    # A dimension that a task spans, such as the hours of a day, is a part of the field; along the others fields lie side by side.
    beside = [d for d in run.recipe["task"] if d in ds.dims and not (run.recipe.get("span") and d == run.recipe["task"][0])]
    result = _fields(beside, run, ds, grid, tuple(quantiles), samples, seed, num_samples)
    if targets is None or set(beside) <= set(order):
        result = result.transpose("sample", *[d for d in order if d in result.dims], ..., missing_dims="ignore")
    return result.assign_attrs(ds.attrs)


def _fields(beside: Sequence[str], run: Run, ds: Any, grid: Any, *how: Any) -> Any:
    """Predict each field of a data set and join the results along the dimensions that were taken apart."""
    if not beside:
        return _field(run, ds, grid, *how)
    import xarray

    d, n = beside[0], ds.sizes[beside[0]]
    if grid.sizes.get(d, n) not in (1, n):
        raise ValueError(f"Expected targets with as many fields along {d} as the data, {n}, or one grid for all. Got {grid.sizes[d]}.")
    parts = []
    for i in range(n):
        there = grid if d not in grid.dims else grid.isel({d: [i if grid.sizes[d] == n else 0]})
        parts.append(_fields(beside[1:], run, ds.isel({d: [i]}), there, *how))
    joined = xarray.concat(parts, dim=d, data_vars="all", coords="minimal", compat="override", join="override")
    return joined.assign_coords({d: ds[d]}) if d in ds.coords else joined


def _field(run: Run, ds: Any, grid: Any, quantiles: Sequence[float], samples: int, seed: int, num_samples: int) -> Any:
    xc, yc, seen, template = grid_points(ds, run.recipe)
    if grid is ds:
        xt = xc
    else:
        hidden = [name for name in run.recipe["outputs"] if name in grid.data_vars]
        xt, _, _, template = grid_points(grid.drop_vars(hidden) if hidden else grid, run.recipe)
    observed = seen.any(1)
    mask = seen[observed] if run.model.missing_outputs or not seen[observed].all() else None
    posterior = run.model.condition(xc[observed], yc[observed], mask=mask, num_samples=num_samples, seed=seed)
    predictive = posterior.predict(xt)
    values: dict[str, FloatArray] = {}
    found = _summaries(predictive, quantiles)
    for j, name in enumerate(run.recipe["outputs"]):
        values |= {f"{name}_{what}": array[:, j] for what, array in found.items()}
        if samples:
            values[f"{name}_sample"] = _numpy(predictive.sample(check_count(samples, "samples"), seed=seed))[..., j]
    return grid_dataset(template, values)


def _summaries(predictive: Predictive, quantiles: Sequence[float]) -> dict[str, FloatArray]:
    found = {"mean": _numpy(predictive.mean), "std": _numpy(predictive.std)}
    return found | {level_name(q): _numpy(predictive.quantile(q)) for q in quantiles}


def level_name(q: float) -> str:
    """Return q05 for 0.05, q97_5 for 0.975."""
    whole, _, rest = f"{100 * q:.6g}".partition(".")
    return f"q{whole:0>2}" + (f"_{rest}" if rest else "")


def _numpy(value: torch.Tensor) -> FloatArray:
    return value.detach().double().cpu().numpy()


# --- ArviZ


@torch.no_grad()
def to_arviz(posterior: Posterior, xt: Any = None, num_samples: int = 500, seed: int = 0, run: Run | None = None) -> Any:
    """Return draws from a posterior of one task, and from its prior, for ArviZ.

    Groups: `posterior` with the weights W0, W1, ... of each layer (of the network between scaled inputs and outputs, bias last) and the
    function f at xt (the expectation of y; of class labels, their probabilities); `posterior_predictive`, `log_likelihood`,
    `observed_data` and `constant_data` at the points seen; `predictions` at xt; `prior` and `prior_predictive` likewise. Draw i is the
    same function in `posterior`, `posterior_predictive`, `predictions` and `log_likelihood`. Draws have equal weights: where particles
    have not, they are drawn in proportion, and their weights are in `constant_data`. Draws are independent given the particles, so
    ArviZ's effective sample size, made for Markov chains, says little here: look at `posterior.diagnose()`.

    Arguments:
        posterior: of one task, without a task axis.
        xt: inputs with shape (M, d_x) where functions are wanted.
        num_samples: number of draws; more than the posterior's particles share hidden weights.
        seed: of the draws.
        run: whose names of columns become coordinates.

    Returns:
        An `arviz.InferenceData`; from ArviZ 1 on, an `xarray.DataTree`. What was streamed is not kept, so groups of points seen are absent.

    Raises:
        ValueError: a posterior of several tasks.
        ImportError: ArviZ is not installed.

    Example:
        >>> posterior = BNNP(1, 1, hidden=(8,)).condition([[0.0]], [[1.0]], num_samples=4)
        >>> to_arviz(posterior, [[0.0], [1.0]], num_samples=10).posterior["f"].dims
        ('chain', 'draw', 'point', 'output')
    """
    if not posterior.single:
        raise ValueError(
            f"Expected the posterior of one task, conditioned on x with shape (points, columns). Got a batch of {posterior.num_tasks}. "
            "Condition on one task at a time."
        )
    n, model = check_count(num_samples, "num_samples"), posterior.model
    assert isinstance(model, BNNP)
    weights = posterior.draws(n, seeded(seed, "posterior"))  # those of sample_weights and sample_functions
    names = _coordinates(model, run)
    groups: dict[str, dict[str, tuple[tuple[str, ...], Any]]] = {
        "posterior": _layers([W.squeeze(1) for W in weights]),
        "prior": _layers(model.prior.sample(n, seeded(seed, "prior functions"))),
        "constant_data": {"particle_weight": (("particle",), _numpy(posterior.weights))},
    }
    if posterior.kept is not None:
        groups |= _seen(posterior, model, weights, n, seed, groups["constant_data"])
    if xt is not None:
        x = check_inputs(xt, model.x_dim, "xt", model.dtype, model.device)
        f = _drawn(posterior, model, weights, x)
        mean, prior = _of_y(model, model.likelihood.mean(f)), model.prior_samples(x, n, seed)
        last = "output" if mean.shape[-1] == model.y_dim else "class"
        groups["posterior"]["f"], groups["prior"]["f"] = _over("point", mean, last), _over("point", prior, last)
        groups["predictions"] = {"y": _over("point", _of_y(model, model.likelihood.sample(f, seeded(seed, "predictions"))))}
        groups["predictions_constant_data"] = {"x": (("point", "input"), _numpy(x))}
    attributes = {
        "inference_library": "bnnp",
        "likelihood": type(model.likelihood).__name__,
        "num_particles": posterior.num_samples,
        "effective_particles": float(posterior.effective_sample_size),
    }
    return _assembled({name: _dataset(of, names, attributes) for name, of in groups.items() if of})


def _layers(weights: Sequence[torch.Tensor]) -> dict[str, tuple[tuple[str, ...], Any]]:
    return {f"W{i}": (("chain", "draw", f"unit{i}", f"input{i}"), _numpy(W)[None]) for i, W in enumerate(weights)}


def _over(points: str, value: torch.Tensor, last: str = "output") -> tuple[tuple[str, ...], Any]:
    return ("chain", "draw", points, last), _numpy(value)[None]


def _drawn(posterior: Posterior, model: BNNP, weights: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    """Return what the networks with these weights give at x (M, d_x), with shape (n, 1, M, f_dim), in the network's units."""
    return to_compute(posterior.particles.architecture.hidden(model.scaling.x(x).unsqueeze(0), weights), posterior.particles.dtype)


def _of_y(model: BNNP, y: torch.Tensor) -> torch.Tensor:
    """Return values of y or its expectation (n, 1, M, d), with shape (n, M, d), in the user's units."""
    return model.scaling.y_inverse(y.squeeze(1).to(model.dtype).to(model.device))


def _seen(
    posterior: Posterior, model: BNNP, weights: tuple[torch.Tensor, ...], n: int, seed: int, constant: dict[str, Any]
) -> dict[str, dict[str, tuple[tuple[str, ...], Any]]]:
    """Return the groups that speak of the points seen, without those that were masked; put their inputs into `constant`."""
    kept = [_observed(points) for points in posterior.kept or ()]
    x, y, seen = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if not len(x):
        return {}
    f = _drawn(posterior, model, weights, x)
    scaled = to_compute(torch.where(seen, model.scaling.y(y), torch.full_like(y, model.likelihood.placeholder)), f.dtype)
    volume = (seen * to_compute(model.scaling.y_scale, f.dtype).log().to(seen.device)).sum(-1)
    density = model.likelihood.log_prob(f, scaled.unsqueeze(0), seen.to(f.device).unsqueeze(0)).squeeze(1) - volume.to(f.device)
    constant["x"] = (("observation", "input"), _numpy(x))
    again = _of_y(model, model.likelihood.sample(f, seeded(seed, "predictive of the seen")))
    return {
        "observed_data": {"y": (("observation", "output"), np.where(seen.cpu().numpy(), _numpy(y), np.nan))},
        "log_likelihood": {"y": (("chain", "draw", "observation"), _numpy(density)[None])},
        "posterior_predictive": {"y": _over("observation", again)},
        "prior_predictive": {"y": _over("observation", model.prior_samples(x, n, seed, noisy=True))},
    }


def _observed(points: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x, y and what was seen of y, of the points of one task of which anything was."""
    x, y, seen = points.x[0], points.y[0], points.observed.expand_as(points.y)[0]
    rows = seen.any(-1)
    return x[rows], y[rows], seen[rows]


def _coordinates(model: BNNP, run: Run | None) -> dict[str, list[str]]:
    """Return names along the dimensions that have some."""
    run = Run.of(model) if run is None else run
    inputs, outputs = [column.name for column in run.inputs], [column.name for column in run.outputs]
    named = {"input": inputs, "output": outputs, "input0": [*inputs, "bias"]}
    widths = [layer.d_out for layer in model.prior]
    named |= {f"input{i + 1}": [*(f"unit {j}" for j in range(d)), "bias"] for i, d in enumerate(widths[:-1])}
    return named


def _dataset(variables: Mapping[str, Any], names: Mapping[str, list[str]], attributes: Mapping[str, Any]) -> Any:
    import xarray

    sizes = {d: k for dims, values in variables.values() for d, k in zip(dims, values.shape, strict=True)}
    coords = {d: (d, names[d] if len(names.get(d, ())) == k else np.arange(k)) for d, k in sizes.items()}
    return xarray.Dataset(dict(variables), coords, attributes)


def _assembled(groups: Mapping[str, Any]) -> Any:
    """Return the groups as this version of ArviZ holds them."""
    # ArviZ 0.23 announces its successor when it is imported, which is no concern of ours.
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        try:
            import arviz
        except ImportError as error:
            raise ImportError('Exporting draws needs ArviZ. Run: pip install "bnnp[arviz]".') from error
    if hasattr(arviz, "InferenceData"):
        return arviz.InferenceData(**groups)
    import xarray

    return xarray.DataTree.from_dict(dict(groups))
