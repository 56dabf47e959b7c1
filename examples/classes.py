"""Tell three kinds of digits apart after five labelled images of each, kinds that were never seen in training.

A task has three digits whose labels 0, 1, 2 are dealt out anew, so that labels mean nothing but what the context says. Training knows the
digits 0 to 3; rivals are tuned on 4 to 6; the test asks about 7 to 9. Images are 12 principal components of those of the training digits,
and each training task is turned by a rotation of its own, or else four digits would be learned by heart.
Run: python examples/classes.py
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

import bnnp

Array = np.ndarray[Any, np.dtype[np.float64]]
Task = tuple[Array, Array]
Split = tuple[Array, Array, Array, Array]
TRAIN, TUNE, TEST, WAYS, SHOTS, IMAGES = (0, 1, 2, 3), (4, 5, 6), (7, 8, 9), 3, 5, 15


def images() -> tuple[Array, Array]:
    """Return features (n, 12) and the digit of each image; only the training digits choose the features."""
    digits = load_digits()
    known = np.isin(digits.target, TRAIN)
    x = PCA(12, random_state=0).fit(digits.data[known]).transform(digits.data)
    return x / x[known].std(), digits.target


def make_tasks(x: Array, digit: Array, kinds: tuple[int, ...], count: int, seed: int, rotate: bool = False) -> list[Task]:
    """Draw tasks of 15 images of each of three digits; the first images of a task are five of each."""
    rng, tasks = np.random.default_rng(seed), []
    for _ in range(count):
        rows = [rng.permutation(np.flatnonzero(digit == kind))[:IMAGES] for kind in rng.permutation(kinds)[:WAYS]]
        order = np.array([rows[k][i] for i in range(IMAGES) for k in range(WAYS)])
        turn = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))[0] if rotate else np.eye(x.shape[1])
        tasks.append((x[order] @ turn, np.tile(np.arange(WAYS, dtype=float), IMAGES)[:, None]))
    return tasks


def split(task: Task, at: int = WAYS * SHOTS) -> Split:
    """Cut a task into five labelled images of each digit and ten to be told apart."""
    return task[0][:at], task[1][:at], task[0][at:], task[1][at:]


def frequencies(task: Split) -> Array:
    """Predict the share of each label in the context."""
    return np.log([[np.mean(task[1] == k) for k in range(WAYS)]] * len(task[2]))


def logistic(task: Split, C: float) -> Array:
    """Fit a logistic regression to the context."""
    return LogisticRegression(C=C, max_iter=1000).fit(task[0], task[1][:, 0]).predict_log_proba(task[2])


def nearest_mean(task: Split, temperature: float) -> Array:
    """Predict by the squared distance from the mean image of each label."""
    means = np.stack([task[0][task[1][:, 0] == k].mean(0) for k in range(WAYS)])
    return torch.as_tensor(-((task[2][:, None] - means) ** 2).sum(-1) / temperature).log_softmax(-1).numpy()


def score(log_p: list[Array], tasks: list[Split]) -> Array:
    """Return log probability of the right label and accuracy, averaged over the images of each task, with shape (2, tasks)."""
    right = [task[3][:, 0].astype(int) for task in tasks]
    both = zip(log_p, right, strict=True)
    return np.array([(p[np.arange(len(y)), y].mean(), (p.argmax(-1) == y).mean()) for p, y in both]).T


def main(steps: int = 2000, tests: int = 200, kinds: tuple[int, ...] = TEST, objective: str = "npml") -> dict[str, tuple[Array, Array]]:
    """Train, and score on new digits beside three rivals."""
    x, digit = images()
    tune, new = ([split(task) for task in make_tasks(x, digit, k, tests, seed=i)] for i, k in ((1, TUNE), (2, kinds)))
    model = bnnp.BNNP(12, 1, hidden=(32,), prior="shared", shared_noise=True, likelihood=bnnp.Categorical(WAYS), activation="tanh")
    train = make_tasks(x, digit, TRAIN, 2000, seed=0, rotate=True)
    bnnp.meta_train(model, train, steps=steps, objective=objective, batch_size=10, learning_rate=1e-2, context=(9, 24))
    grid = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    best = {f: max(grid, key=lambda v: score([f(t, v) for t in tune], tune)[0].mean()) for f in (logistic, nearest_mean)}
    seen = model.condition([t[0] for t in new], [t[1] for t in new], num_samples=128)
    found = {
        "this model": list(seen.predict(np.stack([t[2] for t in new])).probs.log().numpy()),
        "nearest class mean": [nearest_mean(t, best[nearest_mean]) for t in new],
        "logistic regression": [logistic(t, best[logistic]) for t in new],
        "class frequencies": [frequencies(t) for t in new],
    }
    print(f"{tests} tasks of new digits, 5 labelled images of each:  log probability     accuracy")
    result = {name: (s.mean(1), s.std(1, ddof=1) / tests**0.5) for name, s in ((n, score(p, new)) for n, p in found.items())}
    for name, ((a, b), (se_a, se_b)) in result.items():
        print(f"{name:<53} {a:8.3f} +- {se_a:.3f}  {b:.3f} +- {se_b:.3f}")
    return result


if __name__ == "__main__":
    main()
