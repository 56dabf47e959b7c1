"""The model as an estimator of scikit-learn: `fit`, `predict`, `score`, in pipelines, searches and cross-validation.

In scikit-learn rows are samples; here rows belong to tasks, and which row belongs to which is said by `groups`, as scikit-learn's own
splitters say it. Everything is done by `meta_train` and `condition`; this module only speaks the other language.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnnp.likelihoods import Gaussian, Likelihood
from bnnp.networks import BNNP
from bnnp.posterior import Posterior
from bnnp.predictive import Predictive
from bnnp.priors import Prior
from bnnp.seeds import check_count
from bnnp.training import TrainResult, meta_train

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.metrics import r2_score
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError('BNNPRegressor needs scikit-learn 1.6 or newer. Run: pip install "bnnp[data]".') from error

__all__ = ["BNNPRegressor"]

Array = Any  # numpy's types say which kinds of array may index which; nothing here turns on it
Question = Callable[[Predictive, Any], Tensor]

PART = 500
"""Without groups, a training step looks at no more than so many points: parts of the data, taken at random."""
AT_ONCE = 16
"""How many known groups are conditioned on together."""


class BNNPRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Regress with a Bayesian neural network whose prior is learned from groups of rows, each a task.

    With `groups`, `fit` learns the prior of the weights from the groups, and `predict` conditions on the training rows of a row's group.
    A group that is not known, or none, gets the prediction of the learned prior, which has seen no row of that task: `condition(X, y)`
    returns a regressor that has.

    Without `groups` there is one task, from which no prior can be learned: it would be learned from the rows it is then conditioned on,
    and intervals become far too narrow. So the prior is held as it starts, N(0, I / p); noise and inference networks are learned on
    random divisions of the rows, and `predict` conditions on all of them: plain Bayesian regression.

    Columns of X that are constant in `fit` are left out. Predictions are in the units of y, and standard deviations and quantiles are of
    y itself, noise included.

    Arguments:
        hidden: widths of the hidden layers.
        prior: name of a prior, or a `bnnp.Prior`. A name starts with spread 0.9 where it is learned.
        activation: "relu", "tanh", "silu", "gelu" or "sine".
        likelihood: one of bnnp's, but none of class labels; where None, Gaussian noise that is learned from half the deviation of y on.
        shared_noise: one pseudo-noise for each point, shared by the units of a layer; far faster with the priors that share factors.
        steps: of training.
        learning_rate: of the first step.
        batch_size: groups a step.
        context: which share of a task is seen in training, as a range, when the rest is predicted. (0.1, 0.6) where None, and
            (0.5, 0.9) without groups.
        num_samples: particles of a posterior.
        train_samples: particles in training.
        validation_fraction: share of the groups that chooses the step that is kept, where that is at least one of ten groups or more.
        random_state: seed of everything random, a `RandomState`, or None for another fit each time.
        verbose: show a line of progress on standard error.

    Attributes:
        model_: the trained `bnnp.BNNP`.
        posterior_: the `bnnp.Posterior` behind predictions without a known group.
        contexts_: rows (X, y) of each known group.
        groups_: labels of the known groups, an empty list where there were none.
        kept_features_: which columns of X are used, with shape (n_features,).
        n_features_in_: number of columns of X.
        feature_names_in_: their names, where X had names.
        result_: what training reported, a `bnnp.TrainResult`.

    References:
        Amortising inference and meta-learning priors in neural networks (Rochussen and Fortuin, 2026), arXiv 2602.08782.

    Example:
        >>> X, y = np.linspace(0, 1, 20)[:, None], np.linspace(1, 3, 20)
        >>> BNNPRegressor(hidden=(4,), steps=2, random_state=0).fit(X, y).predict(X, return_std=True)[1].shape
        (20,)
    """

    model_: BNNP
    posterior_: Posterior
    contexts_: dict[Any, tuple[Array, Array]]
    groups_: list[Any]
    kept_features_: Array
    result_: TrainResult
    seed_: int
    grouped_: bool

    def __init__(
        self,
        hidden: Sequence[int] = (32, 32),
        prior: str | Prior = "matrix_normal",
        activation: str = "tanh",
        likelihood: Likelihood | None = None,
        shared_noise: bool = True,
        steps: int = 500,
        learning_rate: float = 1e-2,
        batch_size: int = 5,
        context: tuple[float, float] | None = None,
        num_samples: int = 64,
        train_samples: int = 4,
        validation_fraction: float = 0.1,
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.hidden = hidden
        self.prior = prior
        self.activation = activation
        self.likelihood = likelihood
        self.shared_noise = shared_noise
        self.steps = steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.context = context
        self.num_samples = num_samples
        self.train_samples = train_samples
        self.validation_fraction = validation_fraction
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        """Say to scikit-learn what this estimator takes."""
        tags = super().__sklearn_tags__()
        tags.target_tags.single_output = True
        tags.target_tags.multi_output = True
        return tags

    # --- fitting -------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, groups: Any = None) -> BNNPRegressor:
        """Learn from rows, and remember them.

        Arguments:
            X: inputs with shape (n, d_x).
            y: outputs with shape (n,) or (n, d_y).
            groups: which task each row belongs to, with shape (n,); groups of a single row are remembered, but not learned from. None
                for one data set.

        Raises:
            ValueError: values that are missing or not finite, shapes that do not fit, or fewer than two groups of two rows.
        """
        X, Y = self._rows(X, y, reset=True)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        check_count(self.num_samples, "num_samples")
        if not (isinstance(self.validation_fraction, Real) and 0 <= self.validation_fraction < 1):
            raise ValueError(f"Expected validation_fraction between 0 and 1. Got {self.validation_fraction!r}.")
        contexts = {} if groups is None else _by_group(X, Y, self._labels(groups, len(X)))
        self.kept_features_ = X.max(0) > X.min(0)
        if not self.kept_features_.any():
            raise ValueError(f"Expected a column of X that varies. Got {X.shape[1]} constant column(s) in {len(X)} rows.")
        kept = self.kept_features_
        if groups is None:
            tasks, held_out = _parts(X[:, kept], Y, seed), None
        else:
            tasks = [(x[:, kept], out) for x, out in contexts.values() if len(x) > 1]
            held_out = self._held_out(tasks, len(contexts))
        model = self._build(int(kept.sum()), Y.shape[1], groups is None, X.dtype, seed)
        self.result_ = meta_train(
            model, tasks, validation=held_out, steps=self.steps, learning_rate=self.learning_rate,
            final_learning_rate=min(self.learning_rate, 1e-4) if self.learning_rate > 0 else 1e-4, num_samples=self.train_samples,
            batch_size=min(check_count(self.batch_size, "batch_size"), len(tasks)), context=self._range(groups is None), seed=seed,
            progress=bool(self.verbose),
        )  # fmt: skip
        self.model_, self.seed_, self.contexts_, self.grouped_ = model, seed, contexts, groups is not None
        self.groups_ = list(contexts)
        self.posterior_ = self._posterior([X[:0] if self.grouped_ else X], [Y[:0] if self.grouped_ else Y], single=True)
        return self

    def _rows(self, X: Any, y: Any, reset: bool) -> tuple[Array, Array]:
        """Return checked X with shape (n, d_x) and y with shape (n, d_y), of one precision."""
        X, y = validate_data(
            self, X, y, reset=reset, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True, ensure_min_samples=2 if reset else 1
        )
        Y = np.asarray(y, dtype=X.dtype)
        if reset:
            self._y_ndim = Y.ndim
        Y = Y[:, None] if Y.ndim == 1 else Y
        if not reset and Y.shape[1] != self.model_.y_dim:
            raise ValueError(f"Expected y with {self.model_.y_dim} column(s), as in fit. Got {Y.shape[1]}.")
        return X, Y

    def _labels(self, groups: Any, n: int) -> Array:
        """Return the label of each row."""
        labels = column_or_1d(groups)
        if len(labels) != n:
            raise ValueError(f"Expected groups with one label for each of the {n} rows. Got {len(labels)}.")
        if any(label is None or label != label for label in labels.tolist()):
            raise ValueError("Expected a group for every row. Got rows without (None or NaN). Leave them out, or name their group.")
        return labels

    def _held_out(self, tasks: list[Any], count: int) -> float | None:
        if len(tasks) < 2:
            raise ValueError(
                f"Expected at least 2 groups of 2 rows or more to learn a prior from. Got {len(tasks)}, of {count} group(s) in all. "
                "Leave groups out for one data set."
            )
        share = float(self.validation_fraction)
        return share if len(tasks) >= 10 and round(share * len(tasks)) > 0 else None

    def _range(self, alone: bool) -> tuple[float, float]:
        return self.context if self.context is not None else (0.5, 0.9) if alone else (0.1, 0.6)

    def _build(self, x_dim: int, y_dim: int, alone: bool, dtype: Any, seed: int) -> BNNP:
        likelihood = Gaussian(noise_std=0.5) if self.likelihood is None else self.likelihood
        if isinstance(likelihood, Likelihood) and likelihood.labels:
            raise ValueError(f"Expected a likelihood of numbers: this is a regressor. Got {type(likelihood).__name__}. Use bnnp.BNNP.")
        prior = Prior(self.prior, spread=0.0 if alone else 0.9) if isinstance(self.prior, str) else self.prior
        if alone and isinstance(prior, Prior):
            prior = dataclasses.replace(prior, learn_mean=False, learn_scale=False)
        hidden = tuple(self.hidden) if isinstance(self.hidden, list | np.ndarray) else self.hidden
        model = BNNP(x_dim, y_dim, hidden, prior, likelihood, self.activation, shared_noise=self.shared_noise, seed=seed)
        return model.double() if dtype == np.float64 else model

    def _posterior(self, xs: list[Array], ys: list[Array], single: bool = False) -> Posterior:
        xs = [x[:, self.kept_features_] for x in xs]
        x, y = (xs[0], ys[0]) if single else (xs, ys)
        return self.model_.condition(x, y, num_samples=self.num_samples, seed=self.seed_)

    def condition(self, X: Any, y: Any, groups: Any = None) -> BNNPRegressor:
        """Return a regressor that knows these rows of a new task; this one stays as it is, and nothing is trained.

        Arguments:
            X: inputs with shape (n, d_x).
            y: outputs with shape (n,) or (n, d_y).
            groups: where the rows are of several tasks: which each belongs to. Rows of a group that was known are replaced. Where None,
                predictions without a known group are those of the task of these rows.

        Raises:
            ValueError: values or shapes as in `fit`, or groups for a regressor that was fitted without.
        """
        check_is_fitted(self)
        X, Y = self._rows(X, y, reset=False)
        new: BNNPRegressor = copy.copy(self)
        if groups is None:
            new.posterior_ = self._posterior([X], [Y], single=True)
            return new
        self._check_groups()
        new.contexts_ = {**self.contexts_, **_by_group(X, Y, self._labels(groups, len(X)))}
        new.groups_ = list(new.contexts_)
        return new

    def _check_groups(self) -> None:
        if not self.grouped_:
            raise ValueError(
                "Expected no groups, since the regressor was fitted without: all rows were one task. Got groups. Give them to fit as well."
            )

    # --- predictions ---------------------------------------------------------------------------------------------

    def _ask(self, X: Any, groups: Any, question: Question, y: Any = None) -> Array:
        """Return what the posterior of each row's task answers, with a row for each row of X.

        The question gets the predictive of points (M, d_x) or (T, M, d_x) and the rows of y there, and answers with shape ([T,] M, ...).
        """
        check_is_fitted(self)
        if y is None:
            X, Y = validate_data(self, X, reset=False, dtype=[np.float64, np.float32]), None
        else:
            X, Y = self._rows(X, y, reset=False)
        known, others = {}, np.arange(len(X))
        if groups is not None:
            self._check_groups()
            found = _places(self._labels(groups, len(X)))
            known = {label: rows for label, rows in found.items() if label in self.contexts_}
            others = np.sort(np.concatenate([np.arange(0), *(rows for label, rows in found.items() if label not in known)])).astype(int)
        inputs, answers = X[:, self.kept_features_], []
        if len(others):
            answers.append((others, question(self.posterior_.predict(inputs[others]), None if Y is None else Y[others])))
        labels = sorted(known, key=lambda label: len(known[label]))  # those of one size together, so that little is padded
        for i in range(0, len(labels), AT_ONCE):
            chunk = labels[i : i + AT_ONCE]
            longest = max(len(known[label]) for label in chunk)
            # Rows of shorter groups are repeated up to the longest, and their answers left out.
            at = np.stack([np.resize(known[label], longest) for label in chunk])
            seen = [self.contexts_[label] for label in chunk]
            posterior = self._posterior([x for x, _ in seen], [out for _, out in seen])
            answer = question(posterior.predict(inputs[at]), None if Y is None else Y[at])
            answers += [(known[label], answer[t, : len(known[label])]) for t, label in enumerate(chunk)]
        out = np.empty((len(X), *answers[0][1].shape[1:]), dtype=X.dtype)
        for rows, answer in answers:
            out[rows] = answer.numpy()
        return out

    def _flat(self, values: Array) -> Array:
        """Leave out the axis of outputs where y had none."""
        return values[:, 0] if self._y_ndim == 1 else values

    def predict(self, X: Any, groups: Any = None, return_std: bool = False) -> Any:
        """Return the mean of y at the rows of X, and with `return_std` its standard deviation, noise included.

        Arguments:
            X: inputs with shape (n, d_x).
            groups: which task each row belongs to.
            return_std: return a pair.

        Returns:
            Arrays with shape (n,) or (n, d_y), like y in fit.
        """
        if not return_std:
            return self._flat(self._ask(X, groups, lambda p, _: p.mean))
        both = self._ask(X, groups, lambda p, _: torch.stack([p.mean, p.std], -1))
        return self._flat(both[..., 0]), self._flat(both[..., 1])

    def predict_quantiles(self, X: Any, quantiles: Sequence[float] = (0.05, 0.5, 0.95), groups: Any = None) -> Array:
        """Return quantiles of y, with shape (n, q) or (n, d_y, q)."""
        return self._flat(self._ask(X, groups, lambda p, _: torch.stack([p.quantile(q) for q in quantiles], -1)))

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0, groups: Any = None, noisy: bool = True) -> Array:
        """Return draws of y, with shape (n, n_samples) or (n, d_y, n_samples); a draw is one function within a task.

        Arguments:
            X: inputs with shape (n, d_x).
            n_samples: number of draws; more than `num_samples` share hidden weights.
            random_state: seed of the draws.
            groups: which task each row belongs to.
            noisy: draw observations; otherwise their expectation given the function.
        """
        seed = int(check_random_state(random_state).randint(2**31 - 1))
        return self._flat(self._ask(X, groups, lambda p, _: p.sample(n_samples, noisy, seed).movedim(0, -1)))

    def log_predictive_density(self, X: Any, y: Any, groups: Any = None) -> Array:
        """Return log p(y) of each row, summed over outputs, with shape (n,); in the units of y, so that it changes with them."""
        return self._ask(X, groups, lambda p, targets: p.log_prob(targets), y)

    def score(self, X: Any, y: Any, sample_weight: Any = None, groups: Any = None) -> float:
        """Return R^2 of the means, averaged over outputs."""
        return float(r2_score(y, self.predict(X, groups), sample_weight=sample_weight))


def _places(labels: Array) -> dict[Any, Array]:
    """Return the rows of each label, in the order of their first rows."""
    found: dict[Any, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        found.setdefault(label, []).append(row)
    return {label: np.asarray(rows) for label, rows in found.items()}


def _by_group(X: Array, Y: Array, labels: Array) -> dict[Any, tuple[Array, Array]]:
    check_consistent_length(X, Y, labels)
    return {label: (X[rows], Y[rows]) for label, rows in _places(labels).items()}


def _parts(X: Array, Y: Array, seed: int) -> list[tuple[Array, Array]]:
    """Cut one data set at random into parts that a training step can look at; a small one is taken whole, twice."""
    count = -(-len(X) // PART)
    order = np.random.default_rng(seed).permutation(len(X))
    parts = [(X[rows], Y[rows]) for rows in np.array_split(order, count)]
    return parts * 2 if count == 1 else parts
