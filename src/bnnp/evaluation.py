"""Scores of probabilistic predictions, as functions of samples, probabilities and log-densities.

Nothing here knows a model: the scores take tensors, and `evaluate` takes anything with a `condition` that returns
something with a `predict`, so that a learned process, a baseline and an exact oracle are judged by the same code.
"Per point" always means: divided by the number of observed target points, outputs summed (those that were observed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from bnnp.mixtures import crps_gaussian_mixture
from bnnp.tasks import Task

__all__ = [
    "Evaluation",
    "Model",
    "PosteriorLike",
    "PredictiveLike",
    "calibration_error",
    "coverage",
    "crps",
    "crps_gaussian_mixture",
    "energy_distance",
    "energy_distance_test",
    "evaluate",
    "mae",
    "mean_and_se",
    "rmse",
    "split_tasks",
]

ArrayLike: TypeAlias = Any  # a tensor, a NumPy array or a nested list of numbers
SplitTask: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
_Masked: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # as (x, y, observed) of context and targets

_CRPS_DRAWS = 256  # draws where a predictive has no closed-form CRPS
_GRID = 99  # levels at which the distribution of PIT values is compared with the uniform


class PredictiveLike(Protocol):
    """What `evaluate` asks of a prediction at target points; `crps(yt)`, `pit(yt)`, `is_discrete` and `probs` are used if there."""

    @property
    def mean(self) -> Tensor:
        """Return the mean with shape (*T, M, d_y)."""
        ...

    def log_prob(self, yt: Tensor, joint: bool = False, mask: Tensor | None = None) -> Tensor:
        """Return log-densities: (*T, M) summed over outputs, or (*T,) of all observed points together."""
        ...

    def cdf(self, yt: Tensor) -> Tensor:
        """Return P(Y <= yt) with shape (*T, M, d_y)."""
        ...

    def sample(self, n: int, noisy: bool = True, seed: int = 0) -> Tensor:
        """Return draws with shape (n, *T, M, d_y)."""
        ...


class PosteriorLike(Protocol):
    """What `evaluate` asks of a conditioned model."""

    def predict(self, xt: Tensor) -> PredictiveLike:
        """Return the prediction at xt with shape (*T, M, d_x)."""
        ...


class Model(Protocol):
    """What `evaluate` asks of a model."""

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> PosteriorLike:
        """Return the posterior given padded contexts (*T, N, d) of which `mask`, (*T, N) or (*T, N, d_y), says what is observed."""
        ...


def crps(samples: Tensor, y: Tensor) -> Tensor:
    """Estimate the continuous ranked probability score from samples, without bias.

    CRPS(F, y) = E|X - y| - 1/2 E|X - X'|, the second mean over pairs of different samples ("fair" estimator): its
    expectation does not depend on the number of samples. Cost n log n. A single value may be negative.

    Arguments:
        samples: n >= 2 independent draws with shape (n, ...).
        y: observations with shape (...).

    Returns:
        Scores with shape (...), in the units of y; smaller is better.

    Raises:
        ValueError: there are fewer than two samples or the shapes disagree.

    References:
        Fair scores for ensemble forecasts (Ferro, 2014).

    Example:
        >>> crps(torch.tensor([0.0, 2.0]), torch.tensor(1.0))
        tensor(0.)
    """
    n = samples.shape[0] if samples.ndim else 0
    if n < 2 or samples.shape[1:] != y.shape:
        raise ValueError(
            f"Expected samples with shape (n, *{tuple(y.shape)}), n >= 2, for y with shape {tuple(y.shape)}. "
            f"Got {tuple(samples.shape)}. Put the samples on the first axis."
        )
    z = (samples - y).sort(0).values  # centred on y: no digits are lost to a large offset
    rank = torch.arange(1, n + 1, dtype=z.dtype, device=z.device).reshape(n, *[1] * y.ndim)
    # Sorted, sum_{i<j} (z_j - z_i) = sum_i (2 i - n - 1) z_i.
    return z.abs().mean(0) - ((2.0 * rank - n - 1.0) * z).sum(0) / (n * (n - 1))


def coverage(pit: Tensor, levels: Sequence[float] = (0.5, 0.8, 0.95)) -> Tensor:
    """Return the share of observations inside the central prediction interval of each level.

    An observation is inside if |PIT - 1/2| <= level / 2, PIT = F(y) being the predictive distribution function at it.

    Arguments:
        pit: values in [0, 1], of any shape, pooled.
        levels: nominal levels in (0, 1).

    Returns:
        Shares with shape (len(levels),); a calibrated prediction gives the levels.

    Example:
        >>> coverage(torch.tensor([0.01, 0.4, 0.6, 0.99]), (0.5,))
        tensor([0.5000])
    """
    nominal = _check_levels(levels, pit)
    return ((pit.reshape(-1, 1) - 0.5).abs() <= nominal / 2).to(pit.dtype).mean(0)


def calibration_error(pit: Tensor) -> Tensor:
    """Return the mean of |share of PIT values <= u - u| over u = 0.01, 0.02, ..., 0.99.

    0 is perfect, 1/2 the worst. Pool the values of many tasks: those of one task move together, and n independent
    values of a perfectly calibrated prediction still give about 0.31 / sqrt(n).

    Arguments:
        pit: values in [0, 1], of any shape, pooled.

    Returns:
        The error, a scalar.

    Example:
        >>> calibration_error(torch.full((10,), 0.5)).item()  # all predictions far too wide
        0.252525...
    """
    return _calibration_from_counts(_pit_counts(pit), pit.numel())


def rmse(prediction: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return sqrt(mean (prediction - y)^2) over the observed points and all outputs of each task.

    Arguments:
        prediction: with shape (*T, M, d_y).
        y: observations with shape (*T, M, d_y).
        mask: True where a point is observed, with shape (*T, M), or an output, (*T, M, d_y).

    Returns:
        Errors with shape (*T,), in the units of y.
    """
    return _masked_mean((prediction - y) ** 2, mask).sqrt()


def mae(prediction: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return mean |prediction - y| over the observed points and all outputs of each task; arguments as in `rmse`."""
    return _masked_mean((prediction - y).abs(), mask)


def energy_distance(a: Tensor, b: Tensor) -> Tensor:
    """Estimate the squared energy distance between two distributions, without bias.

    2 E|A - B| - E|A - A'| - E|B - B'| with Euclidean norms, means over pairs of different samples. Its expectation is
    0 if and only if the distributions agree; a single estimate may then be negative. Made for functions on a grid, one
    per row: are prior samples distributed as the true functions? Memory (n + m)^2.

    Arguments:
        a: samples with shape (n, d), n >= 2.
        b: samples with shape (m, d), m >= 2.

    Returns:
        The estimate, a scalar, in the units of the samples.

    Raises:
        ValueError: there are fewer than two samples or the widths disagree.

    References:
        Energy statistics: a class of statistics based on distances (Szekely and Rizzo, 2013).
    """
    D = _pooled_distances(a, b)
    in_a = torch.zeros((1, len(D)), dtype=D.dtype, device=D.device)
    in_a[:, : len(a)] = 1.0
    return _energy_statistics(D, in_a)[0]


def energy_distance_test(a: Tensor, b: Tensor, generator: torch.Generator, num_permutations: int = 500) -> tuple[float, float]:
    """Return `energy_distance` and the p-value of the permutation test of equal distributions.

    p = (1 + #{permuted >= observed}) / (1 + num_permutations): at most alpha with probability at most alpha, if equal.

    Arguments:
        a: samples with shape (n, d), n >= 2.
        b: samples with shape (m, d), m >= 2.
        generator: source of the permutations, on the CPU.
        num_permutations: how many.
    """
    D = _pooled_distances(a, b)
    labels = torch.zeros((num_permutations + 1, len(D)), dtype=D.dtype)
    labels[0, : len(a)] = 1.0
    for i in range(1, num_permutations + 1):
        labels[i, torch.randperm(len(D), generator=generator)[: len(a)]] = 1.0
    statistics = _energy_statistics(D, labels.to(D.device))
    # Equal sums in another order differ by rounding; a tie must count as one.
    slack = 1e3 * torch.finfo(D.dtype).eps * D.mean()
    extreme = int((statistics[1:] >= statistics[0] - slack).sum())
    return float(statistics[0]), (1 + extreme) / (1 + num_permutations)


def _pooled_distances(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"Expected samples with shapes (n, d) and (m, d), n and m >= 2. Got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Flatten each function's values into one row."
        )
    pooled = torch.cat([a, b])
    # The faster product form of cdist loses half of the digits between near neighbours.
    return torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")


def _energy_statistics(D: Tensor, in_a: Tensor) -> Tensor:
    """Return the statistic for each row of 0/1 labels (P, n + m), given all distances (n + m, n + m)."""
    in_b = 1.0 - in_a
    n, m = in_a.sum(-1), in_b.sum(-1)
    to_a = in_a @ D  # (P, n + m): summed distance of every point to the points of a
    aa, ab, bb = (to_a * in_a).sum(-1), (to_a * in_b).sum(-1), ((in_b @ D) * in_b).sum(-1)
    return 2.0 * ab / (n * m) - aa / (n * (n - 1.0)) - bb / (m * (m - 1.0))


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Return the mean over tasks and its standard error, s / sqrt(T) with s the deviation with ddof = 1.

    Arguments:
        values: one per task, with shape (T,). The standard error of a single one is NaN.

    Example:
        >>> mean_and_se(torch.tensor([1.0, 3.0]))
        (2.0, 1.0)
    """
    se = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), se


@dataclass(frozen=True)
class Evaluation:
    """Hold the scores of a model on a list of tasks.

    Arguments:
        per_task: name -> one value per task, float64 with shape (T,).
        summary: name -> (mean over tasks, standard error over tasks). `calibration_error` is only here: it is computed
            from the PIT values of all tasks together, its standard error is the jackknife over tasks.
        pit: all PIT values, float64 with shape (P,), for pictures; None for class labels.
    """

    per_task: dict[str, Tensor]
    summary: dict[str, tuple[float, float]]
    pit: Tensor | None

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks."""
        return len(next(iter(self.per_task.values())))

    def table(self) -> str:
        """Return the summary as text, one score per line."""
        width = max(len(name) for name in self.summary)
        lines = [f"{'score':<{width}}  {'mean':>10}  {'se':>10}"]
        lines += [f"{name:<{width}}  {mean:>10.4f}  {se:>10.4f}" for name, (mean, se) in self.summary.items()]
        return "\n".join([*lines, f"({self.num_tasks} tasks)"])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the PIT values as plain Python, ready for JSON; what is not finite becomes None."""
        return {
            "num_tasks": self.num_tasks,
            "summary": {name: {"mean": _plain(mean), "se": _plain(se)} for name, (mean, se) in self.summary.items()},
            "per_task": {name: [_plain(v) for v in values.tolist()] for name, values in self.per_task.items()},
        }


def split_tasks(tasks: Sequence[Sequence[ArrayLike]], context_fraction: float | tuple[float, float], seed: int = 0) -> list[SplitTask]:
    """Split each task (x, y) at random into context and targets.

    Arguments:
        tasks: pairs (x, y) with shapes (N, d_x) and (N, d_y).
        context_fraction: share of the points that is context, in [0, 1], or a range from which each task draws its own.
            The number of context points is rounded, and at least one point is a target.
        seed: of the splits. They do not depend on anything else, so methods can be compared on the same ones.

    Returns:
        A list of (xc, yc, xt, yt).
    """
    low, high = context_fraction if isinstance(context_fraction, tuple) else (context_fraction, context_fraction)
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"Expected context_fraction in [0, 1] or a range in it. Got {context_fraction}.")
    generator = torch.Generator().manual_seed(seed)
    result: list[SplitTask] = []
    for index, (x, y) in enumerate(tasks):
        x, y = _matrix(x), _matrix(y)
        if len(x) != len(y) or len(x) < 1:
            raise ValueError(f"Expected x and y with the same number (>= 1) of rows. Got {len(x)}, {len(y)} in task {index}.")
        share = low + (high - low) * float(torch.rand((), generator=generator))
        order = torch.randperm(len(x), generator=generator)
        n = min(round(share * len(x)), len(x) - 1)
        result.append((x[order[:n]], y[order[:n]], x[order[n:]], y[order[n:]]))
    return result


def evaluate(
    model: Model,
    tasks: Sequence[Sequence[ArrayLike] | Task],
    num_samples: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    context_fraction: float | tuple[float, float] | None = None,
) -> Evaluation:
    """Score a model's predictions on tasks, each task counting the same.

    Scores, in user units: `joint_log_density`, log p(all targets of the task together) / number of targets;
    `marginal_log_density`, mean of log p(y_n); both summed over outputs; `rmse`, `mae` of the predictive mean; `crps`;
    `coverage_<level>` of central intervals; `calibration_error`. Counts are scored likewise, with PIT values drawn at random between
    P(y < y_n) and P(y <= y_n). For class labels the last three give way to `brier`, mean (P(y = 1) - y)^2, or with K classes the sum
    over classes; and to `accuracy`. With K classes there is neither `rmse` nor `mae`.

    Arguments:
        model: anything with `condition`, see `Model`.
        tasks: (xc, yc, xt, yt) with shapes (N, d_x), (N, d_y), (M, d_x), (M, d_y), of any N >= 0 and M >= 1; or pairs
            (x, y) together with `context_fraction`, see `split_tasks`. With masks, True = observed, (n,) or (n, d_y):
            (xc, yc, mask_c, xt, yt, mask_t), or triples (x, y, mask).
        num_samples: posterior samples of each prediction.
        seed: of the splits; batch number i conditions and draws with seed + i.
        batch_size: tasks conditioned at once, padded to the largest.
        levels: of the central intervals.
        context_fraction: share of context points, for pairs.

    Returns:
        The scores of each task and their means and standard errors over tasks.

    Raises:
        ValueError: the tasks are empty, disagree in shape or hold values that are not finite.
    """
    pairs = [plain_task(task) for task in tasks]
    splits = check_tasks(pairs, context_fraction, seed)
    if batch_size < 1:
        raise ValueError(f"Expected batch_size >= 1. Got {batch_size}.")
    parts: list[dict[str, Tensor]] = []
    pits: list[Tensor] = []
    for i, start in enumerate(range(0, len(splits), batch_size)):
        xc, yc, mask_c, xt, yt, mask_t = _pad(splits[start : start + batch_size])
        with torch.no_grad():
            posterior = model.condition(xc, yc, mask=mask_c, num_samples=num_samples, seed=seed + i)
            scores, pit = _score_batch(posterior.predict(xt), yt, mask_t, seed + i)
        parts.append(scores)
        pits += pit
    per_task = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not pits:
        return Evaluation(per_task, {name: mean_and_se(v) for name, v in per_task.items()}, None)
    covered = torch.stack([coverage(pit, levels) for pit in pits])  # (T, levels)
    per_task |= {f"coverage_{level:g}": covered[:, k] for k, level in enumerate(levels)}
    summary = {name: mean_and_se(values) for name, values in per_task.items()}
    summary["calibration_error"] = _calibration_and_jackknife(pits)
    return Evaluation(per_task, summary, torch.cat(pits))


def plain_task(task: Sequence[ArrayLike] | Task) -> Sequence[ArrayLike]:
    """Return a task as its arrays: inputs, outputs, and which of them were seen where some were not."""
    if not isinstance(task, Task):
        return task
    return (task.x, task.y) if task.seen is None else (task.x, task.y, task.seen)


def _score_batch(predictive: PredictiveLike, yt: Tensor, mask: Tensor, seed: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the scores (T,) of a padded batch and the PIT values of each of its tasks, an empty list for class labels."""
    y, mean = _plain_tensor(yt), _plain_tensor(predictive.mean)
    observed = mask.cpu()
    points = observed.any(-1) if observed.ndim == y.ndim else observed
    joint = _plain_tensor(predictive.log_prob(yt, joint=True, mask=mask))
    each = _plain_tensor(predictive.log_prob(yt, joint=False, mask=mask))
    scores = {"joint_log_density": joint / points.sum(-1), "marginal_log_density": _masked_mean(each.unsqueeze(-1), points)}
    probs = getattr(predictive, "probs", None)
    if probs is not None and mean.shape != y.shape:
        hit = (mean.argmax(-1, keepdim=True) == y).to(y.dtype)
        one_hot = torch.nn.functional.one_hot(y.squeeze(-1).long(), mean.shape[-1])
        scores["brier"] = _masked_mean((mean - one_hot).square().sum(-1, keepdim=True), observed)
        return scores | {"accuracy": _masked_mean(hit, observed)}, []
    scores |= {"rmse": rmse(mean, y, observed), "mae": mae(mean, y, observed)}
    pit = getattr(predictive, "pit", None)
    if probs is not None or (pit is None and getattr(predictive, "is_discrete", False)):
        scores["brier"] = _masked_mean((mean - y) ** 2, observed)
        return scores | {"accuracy": _masked_mean(((mean >= 0.5) == (y >= 0.5)).to(y.dtype), observed)}, []
    closed_form = getattr(predictive, "crps", None)
    if closed_form is not None:
        point_crps = _plain_tensor(closed_form(yt, mask=mask) if observed.ndim == y.ndim else closed_form(yt))
    else:
        point_crps = crps(_plain_tensor(predictive.sample(_CRPS_DRAWS, noisy=True, seed=seed)), y)
    scores["crps"] = _masked_mean(point_crps, observed)
    u = _plain_tensor(predictive.cdf(yt) if pit is None else pit(yt, mask=mask, seed=seed))
    keep = (observed if observed.ndim == y.ndim else observed.unsqueeze(-1)).expand_as(y)
    return scores, [u[t][keep[t]] for t in range(len(u))]


def check_tasks(tasks: Sequence[Sequence[ArrayLike]], context_fraction: float | tuple[float, float] | None, seed: int) -> list[_Masked]:
    """Return checked tasks cut into context and targets, each half with its mask; arguments as of `evaluate`."""
    if len(tasks) == 0:
        raise ValueError("Expected at least one task. Got an empty list.")
    lengths = {len(task) for task in tasks}
    if lengths <= {2, 3} and context_fraction is not None:
        # The mask rides along as further columns of y, so that splits are those of the same pairs without one.
        whole = [(_matrix(task[0]), _matrix(task[1]), task[2] if len(task) > 2 else None) for task in tasks]
        joined = [(x, torch.cat([y, _observed(given, y).to(y.dtype)], dim=-1)) for x, y, given in whole]
        halves = split_tasks(joined, context_fraction, seed)
        splits = [(xc, *_uncoupled(yc), xt, *_uncoupled(yt)) for xc, yc, xt, yt in halves]
    elif lengths <= {4, 6} and context_fraction is None:
        full = [tuple(task) if len(task) == 6 else (task[0], task[1], None, task[2], task[3], None) for task in tasks]
        splits = [_halves(task, index) for index, task in enumerate(full)]
    else:
        raise ValueError(
            "Expected tasks (xc, yc, xt, yt), or pairs (x, y) with context_fraction; or with masks (xc, yc, mask_c, xt, yt, mask_t) or "
            f"(x, y, mask). Got tasks of {sorted(lengths)} arrays and context_fraction={context_fraction}."
        )
    d_x, d_y = splits[0][3].shape[1], splits[0][4].shape[1]
    checked: list[_Masked] = []
    for index, (xc, yc, sc, xt, yt, st) in enumerate(splits):
        if len(xc) == 0:  # an empty list or array says nothing about its width
            xc, yc = xt[:0], yt[:0] if len(yc) == 0 else yc
            sc = sc.new_zeros(yc.shape) if len(yc) == 0 else sc
        if (xc.shape[1], yc.shape[1], xt.shape[1], yt.shape[1]) != (d_x, d_y, d_x, d_y):
            raise ValueError(
                f"Expected d_x = {d_x} inputs and d_y = {d_y} outputs, as in the first task. Got shapes "
                f"{[tuple(v.shape) for v in (xc, yc, xt, yt)]} in task {index}."
            )
        seen_c, seen_t = sc.any(-1), st.any(-1)
        if len(xc) != len(yc) or len(xt) != len(yt) or not bool(seen_t.any()):
            raise ValueError(
                f"Expected as many outputs as inputs, and at least one target, in task {index}. Got {len(xc)} and "
                f"{len(yc)} in the context, {len(xt)} and {int(seen_t.sum())} in the targets."
            )
        # Points of which nothing was observed are left out, and what is not observed of the others may be anything.
        xc, yc, sc, xt, yt, st = xc[seen_c], yc[seen_c], sc[seen_c], xt[seen_t], yt[seen_t], st[seen_t]
        if not all(bool(v.isfinite().all()) for v in (xc, yc[sc], xt, yt[st])):
            raise ValueError(f"Expected finite numbers. Got NaN or infinity in task {index}. Drop those points first.")
        yc, yt = (torch.where(s, y, yt[st][0]) for s, y in ((sc, yc), (st, yt)))
        checked.append((xc, yc, sc, xt, yt, st))
    return checked


def _halves(task: Sequence[ArrayLike], index: int) -> _Masked:
    xc, yc, mask_c, xt, yt, mask_t = task
    found = [_matrix(part) for part in (xc, yc, xt, yt)]
    if len(found[0]) != len(found[1]) or len(found[2]) != len(found[3]):
        raise ValueError(
            f"Expected as many outputs as inputs, and at least one target, in task {index}. Got {len(found[0])} and {len(found[1])} in "
            f"the context, {len(found[2])} and {len(found[3])} in the targets."
        )
    return found[0], found[1], _observed(mask_c, found[1]), found[2], found[3], _observed(mask_t, found[3])


def _observed(mask: ArrayLike, y: Tensor) -> Tensor:
    """Return a mask (n,) or (n, d_y), or None, as (n, d_y)."""
    if mask is None:
        return torch.ones_like(y, dtype=torch.bool)
    found = torch.as_tensor(mask)
    if found.dtype != torch.bool or tuple(found.shape) not in ((len(y),), tuple(y.shape)):
        raise ValueError(
            f"Expected a mask of booleans with shape ({len(y)},) or {tuple(y.shape)}, True = observed. Got {found.dtype} with shape "
            f"{tuple(found.shape)}."
        )
    return (found if found.ndim == 2 else found.unsqueeze(-1)).expand_as(y).to(y.device)


def _uncoupled(both: Tensor) -> tuple[Tensor, Tensor]:
    y, mask = both.chunk(2, dim=-1)
    return y, mask > 0.5


def _matrix(values: ArrayLike) -> Tensor:
    """Return a floating-point tensor with shape (N, d); a vector is one column."""
    if not isinstance(values, Tensor):
        # A copy: NumPy arrays may be read-only or reversed views, which torch refuses or warns about.
        values = torch.as_tensor(values.copy() if hasattr(values, "copy") else values)
    tensor: Tensor = values if values.is_floating_point() else values.to(torch.get_default_dtype())
    if tensor.ndim == 1:
        tensor = tensor.unsqueeze(-1)
    if tensor.ndim != 2:
        raise ValueError(f"Expected arrays with shape (N, d) or (N,). Got {tuple(tensor.shape)}. Pass a list of tasks.")
    return tensor


def _pad(splits: Sequence[_Masked]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stack tasks to (xc, yc, mask_c, xt, yt, mask_t); masks have an axis of outputs where single ones are missing.

    Padding repeats the first target's input (and, among the targets only, its output): always in range. At least one
    context row is there, so that a batch of empty contexts has the same shape as any other.
    """
    most_c, most_t = max(1, *(len(s[0]) for s in splits)), max(len(s[3]) for s in splits)
    xc = torch.stack([_extend(xc, xt[0], most_c) for xc, _, _, xt, _, _ in splits])
    yc = torch.stack([_extend(yc, torch.zeros_like(yt[0]), most_c) for _, yc, _, _, yt, _ in splits])
    xt = torch.stack([_extend(xt, xt[0], most_t) for _, _, _, xt, _, _ in splits])
    yt = torch.stack([_extend(yt, yt[0], most_t) for _, _, _, _, yt, _ in splits])
    masks = []
    for at, most in ((2, most_c), (5, most_t)):
        mask = torch.stack([_extend(s[at], torch.zeros_like(s[5][0]), most) for s in splits])
        masks.append(mask if bool((mask.any(-1) != mask.all(-1)).any()) else mask.any(-1))
    return xc, yc, masks[0], xt, yt, masks[1]


def _extend(rows: Tensor, fill: Tensor, size: int) -> Tensor:
    return torch.cat([rows, fill.expand(size - len(rows), -1)])


def _masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of (*T, M, d) over observed points and outputs, with shape (*T,)."""
    if mask is None:
        return values.mean((-2, -1))
    observed = (mask if mask.ndim == values.ndim else mask.unsqueeze(-1)).expand_as(values)
    return torch.where(observed, values, torch.zeros_like(values)).sum((-2, -1)) / observed.sum((-2, -1))


def _check_levels(levels: Sequence[float], pit: Tensor) -> Tensor:
    if not all(0.0 < level < 1.0 for level in levels):
        raise ValueError(f"Expected levels between 0 and 1, such as 0.95. Got {tuple(levels)}.")
    return torch.tensor(list(levels), dtype=pit.dtype, device=pit.device)


def _pit_counts(pit: Tensor) -> Tensor:
    grid = torch.arange(1, _GRID + 1, dtype=pit.dtype, device=pit.device) / (_GRID + 1)
    # Sort and search: memory stays linear in the number of values.
    return torch.searchsorted(pit.reshape(-1).sort().values, grid, right=True)


def _calibration_from_counts(counts: Tensor, total: int | Tensor) -> Tensor:
    """Return the error from counts (..., grid) of values <= u and their total number (..., 1)."""
    grid = torch.arange(1, _GRID + 1, dtype=torch.float64, device=counts.device) / (_GRID + 1)
    return (counts.to(torch.float64) / total - grid).abs().mean(-1)


def _calibration_and_jackknife(pits: Sequence[Tensor]) -> tuple[float, float]:
    counts = torch.stack([_pit_counts(pit) for pit in pits])  # (T, grid)
    sizes = torch.tensor([[pit.numel()] for pit in pits])  # (T, 1)
    error = float(_calibration_from_counts(counts.sum(0), sizes.sum(0)))
    T = len(pits)
    if T < 2:
        return error, math.nan
    without = _calibration_from_counts(counts.sum(0) - counts, sizes.sum(0) - sizes)  # (T,)
    return error, float((without - without.mean()).square().sum().mul((T - 1) / T).sqrt())


def _plain_tensor(values: Tensor) -> Tensor:
    return values.detach().to("cpu").to(torch.float64)


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
