"""The choice of a prior: the same as doing it by hand; nothing held out is learned from; what is done is not done again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import bnnp
from bnnp import choice, plots
from bnnp.evaluation import evaluate, mean_and_se
from bnnp.tasks import Task

SETTINGS: dict[str, Any] = {"x_dim": 1, "y_dim": 1, "hidden": (4,), "prior": bnnp.Prior("shared", spread=0.5), "activation": "tanh"}
FAST: dict[str, Any] = {"steps": 3, "num_samples": 2, "batch_size": 2, "learning_rate": 0.05, "context": (0.2, 0.6)}
QUICK: dict[str, Any] = {**FAST, "score_samples": 8, "splits": 2, "progress": False}


def tasks(n: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(n):
        x = torch.rand(int(torch.randint(6, 10, (1,), generator=g)), 1, generator=g) * 4 - 2
        out.append((x, torch.randn(1, generator=g) * torch.sin(2 * x) + 0.1 * torch.randn(x.shape, generator=g)))
    return out


def same(a: bnnp.BNNP, b: bnnp.BNNP) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_choice_is_what_one_would_do_by_hand() -> None:
    data, folds = tasks(5), [[0, 3], [1], [2, 4]]
    found = bnnp.choose_prior(SETTINGS, data, folds=folds, fractions=(0.0, 0.5, 1.0), shrinkages=(0.5, 0.0), seed=3, **QUICK)
    names = ["fixed", "fraction 0.5", "all learned", "shrinkage 0.5"]
    assert [row["name"] for row in found.rows] == names
    by_hand: dict[str, torch.Tensor] = {}
    for name, fraction, tau in zip(names, (0.0, 0.5, 1.0, 1.0), (0.0, 0.0, 0.0, 0.5), strict=True):
        scores = []
        for fold in folds:
            model = bnnp.BNNP(**{**SETTINGS, "prior": bnnp.Prior("shared", spread=0.5, fraction=fraction)})
            bnnp.meta_train(model, [t for i, t in enumerate(data) if i not in fold], shrinkage=tau, seed=3, progress=False, **FAST)
            splits = choice.random_splits([Task(*data[i]) for i in fold], (0.2, 0.6), 2, 3)
            values = evaluate(model, splits, num_samples=8, seed=3).per_task["joint_log_density"]
            scores += [float(values[2 * i : 2 * i + 2].mean()) for i in range(len(fold))]
        by_hand[name] = torch.tensor(scores, dtype=torch.float64)
    best = max(by_hand, key=lambda name: float(by_hand[name].mean()))
    for row in found.rows:
        assert row["per_task"] == pytest.approx(by_hand[row["name"]].tolist(), abs=1e-9)
        assert (row["score"], row["se"]) == pytest.approx(mean_and_se(by_hand[row["name"]]))
        assert row["chosen"] == (row["name"] == best)
        if not row["chosen"]:
            assert (row["behind"], row["behind_se"]) == pytest.approx(mean_and_se(by_hand[best] - by_hand[row["name"]]))
    chosen = found.best
    final = bnnp.BNNP(**{**SETTINGS, "prior": bnnp.Prior("shared", spread=0.5, fraction=chosen["fraction"])})
    bnnp.meta_train(final, data, shrinkage=chosen["shrinkage"], seed=3, progress=False, **FAST)
    assert same(found.model, final)
    assert found.folds == 3 and "5 held-out tasks, 3 folds" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_with_validation_tasks_the_compared_model_is_the_chosen_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    found = bnnp.choose_prior(SETTINGS, tasks(4), validation=tasks(3, 9), fractions=(0.0, 1.0), shrinkages=(), **QUICK)
    assert [len(train) for train, _ in seen] == [4, 4]
    assert same(found.model, next(model for _, model in seen if model.config["prior"]["fraction"] == found.best["fraction"]))
    assert len(found.best["per_task"]) == 3 and "3 held-out tasks" in found.table() and "folds" not in found.table()


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Any], bnnp.BNNP]]:
    """Note what every training learns from, and its model."""
    seen: list[tuple[list[Any], bnnp.BNNP]] = []

    def training(model: bnnp.BNNP, tasks: list[Any], **settings: Any) -> bnnp.TrainResult:
        seen.append((list(tasks), model))
        return bnnp.meta_train(model, tasks, **settings)

    monkeypatch.setattr(choice, "meta_train", training)
    return seen


@pytest.mark.parametrize(("options", "sizes"), [({}, [1] * 5), ({"folds": 2}, [2, 3]), ({"validation": 0.4}, [2])])
def test_no_fold_learns_from_what_it_holds_out_and_the_last_learns_from_all(
    options: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, data = recorded(monkeypatch), tasks(5)
    scored: list[torch.Tensor] = []

    def scoring(model: bnnp.BNNP, splits: list[Any], **settings: Any) -> bnnp.Evaluation:
        scored.append(torch.cat([torch.cat([xc, xt]) for xc, _, xt, _ in splits]))
        return evaluate(model, splits, **settings)

    monkeypatch.setattr(choice, "evaluate", scoring)
    bnnp.choose_prior(SETTINGS, data, fractions=(1.0,), shrinkages=(), **options, **QUICK)
    held = []
    for (train, _), points in zip(seen, scored, strict=False):
        inside = {float(v) for task in train for v in task.x[:, 0]}
        out = [i for i, (x, _) in enumerate(data) if set(x[:, 0].tolist()) <= set(points[:, 0].tolist())]
        assert not inside & set(points[:, 0].tolist())
        assert len(train) + len(out) == 5
        held.append(out)
    assert sorted(len(out) for out in held) == sorted(sizes)
    assert len({i for out in held for i in out}) == sum(sizes)
    assert len(seen[-1][0]) == 5 and len(seen) == len(sizes) + 1


def test_twenty_tasks_are_held_out_once() -> None:
    assert [len(fold) for fold in choice._folds(20, None, None, 0)] == [4]
    assert [len(fold) for fold in choice._folds(19, None, None, 0)] == [4, 4, 4, 4, 3]
    assert [len(fold) for fold in choice._folds(3, None, None, 0)] == [1, 1, 1]


@pytest.mark.parametrize("context", [(0.2, 0.6), (2, 4)])
def test_splits_part_a_task_and_their_sizes_fill_the_range(context: tuple[Any, Any]) -> None:
    x = torch.arange(10.0).unsqueeze(-1)
    splits = choice.random_splits([Task(x, 2 * x)], context, 60, 0)
    sizes = {len(xc) for xc, _, _, _ in splits}
    assert sizes == ({2, 3, 4} if context[0] == 2 else {2, 3, 4, 5, 6})
    for xc, yc, xt, yt in splits:
        torch.testing.assert_close(torch.cat([xc, xt]).sort(0).values, x)
        torch.testing.assert_close(torch.cat([yc, yt]), 2 * torch.cat([xc, xt]))


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"fractions": (0.0, 1.0), "shrinkages": (0.5,), "folds": 2, "folder": tmp_path, **QUICK}
    whole = bnnp.choose_prior(SETTINGS, tasks(4), **{**options, "folder": None})
    original, count = bnnp.meta_train, 0

    def stopping(*args: Any, **settings: Any) -> bnnp.TrainResult:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return original(*args, **settings)

    monkeypatch.setattr(choice, "meta_train", stopping)
    with pytest.raises(KeyboardInterrupt):
        bnnp.choose_prior(SETTINGS, tasks(4), **options)
    count = 4
    again = bnnp.choose_prior(SETTINGS, tasks(4), **options)
    assert count == 4 + 7 - 3
    third = bnnp.choose_prior(SETTINGS, tasks(4), **options)
    assert count == 4 + 7 - 3
    for other in (again, third):
        assert same(whole.model, other.model)
        assert [row["per_task"] for row in other.rows] == [row["per_task"] for row in whole.rows]
    # More candidates may join; other tasks or settings may not.
    more = bnnp.choose_prior(SETTINGS, tasks(4), **{**options, "shrinkages": (0.5, 2.0)})
    assert count == 8 + 2 + (more.best["name"] == "shrinkage 2") and len(more.rows) == 4
    for changed in ({"steps": 4}, {"splits": 3}, {"seed": 1}):
        with pytest.raises(ValueError, match="Use another folder"):
            bnnp.choose_prior(SETTINGS, tasks(4), **{**options, **changed})
    with pytest.raises(ValueError, match="Use another folder"):
        bnnp.choose_prior(SETTINGS, tasks(4, 1), **options)


def test_a_candidate_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    original = bnnp.meta_train

    def failing(model: bnnp.BNNP, tasks: Any, **settings: Any) -> bnnp.TrainResult:
        if settings["shrinkage"] == 0.5 or fail_all:
            raise bnnp.TrainingError("Expected a finite objective. Got none")
        return original(model, tasks, **settings)

    fail_all = False
    monkeypatch.setattr(choice, "meta_train", failing)
    found = bnnp.choose_prior(SETTINGS, tasks(4), folds=2, fractions=(1.0,), shrinkages=(0.5, 1.0), **QUICK)
    bad = found.rows[1]
    assert bad["failed"] == "Expected a finite objective" and math.isnan(bad["score"]) and not bad["chosen"]
    assert "failed: Expected a finite objective" in found.table()
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(plots.choice(found.rows).axes) == 2
    fail_all = True
    with pytest.raises(bnnp.TrainingError, match="candidate that can be trained"):
        bnnp.choose_prior(SETTINGS, tasks(4), folds=2, fractions=(1.0,), shrinkages=(), **QUICK)


def test_a_function_builds_models_too() -> None:
    def build(prior: bnnp.Prior) -> bnnp.BNNP:
        return bnnp.BNNP(**{**SETTINGS, "prior": prior})

    options = {"fractions": (0.5, 1.0), "shrinkages": (), "folds": 2, **QUICK}
    a = bnnp.choose_prior(build, tasks(4), prior=bnnp.Prior("shared", spread=0.5), **options)
    b = bnnp.choose_prior(SETTINGS, tasks(4), **options)
    assert same(a.model, b.model)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "two tasks leave one": ({"tasks": tasks(2)}, ValueError, "at least 2 tasks to learn from in every fold. Got 1 of 2"),
    "both": ({"validation": 0.5, "folds": 2}, ValueError, "validation or folds. Got both"),
    "one fold": ({"folds": 1}, ValueError, "Expected 2 to 4 folds"),
    "too many folds": ({"folds": 5}, ValueError, "Expected 2 to 4 folds"),
    "positions": ({"folds": [[0], [7]]}, ValueError, "positions between 0 and 3"),
    "an empty fold": ({"folds": [[0], []]}, ValueError, "none of them empty"),
    "share": ({"validation": 1.2}, ValueError, "proportion with tasks on both sides"),
    "fraction": ({"fractions": (1.5,)}, ValueError, "fraction in"),
    "shrinkage": ({"shrinkages": (-1.0,)}, ValueError, "shrinkages in nats"),
    "nothing to try": ({"fractions": (), "shrinkages": ()}, ValueError, "to try. Got none"),
    "own settings": ({"keep": "best"}, TypeError, "Got keep"),
    "no model": ({"build": lambda prior: None}, TypeError, "build to return a bnnp.BNNP"),
    "not a builder": ({"build": 3}, TypeError, "build as a function"),
    "prior": ({"prior": 3}, TypeError, "prior as a name"),
    "splits": ({"splits": 0}, ValueError, "splits as a positive integer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_choices_get_one_clear_error_before_any_training(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, kind, words = BAD[case]
    monkeypatch.setattr(choice, "meta_train", lambda *args, **settings: pytest.fail("it trains"))
    options = {"build": SETTINGS, "tasks": tasks(4), **QUICK, **changed}
    with pytest.raises(kind, match=words):
        bnnp.choose_prior(options.pop("build"), options.pop("tasks"), **options)


def test_a_score_far_below_the_others_does_not_flatten_the_picture() -> None:
    rows = [
        {"name": name, "fraction": f, "shrinkage": tau, "score": score, "behind_se": 0.1, "failed": None, "chosen": score == 1.0}
        for name, f, tau, score in (("a", 0.0, 0.0, 0.0), ("b", 0.5, 0.0, 0.5), ("c", 1.0, 0.0, -4000.0), ("d", 1.0, 0.1, 1.0))
    ]
    left, right = plots.choice(rows).axes
    low, high = left.get_ylim()
    assert -4 < low < 0 and 1 < high < 2
    assert any("4000" in text.get_text() for text in left.texts)
    labels = dict(zip(right.get_xticks(), (text.get_text() for text in right.get_xticklabels()), strict=True))
    assert [labels[place] for place in sorted(labels)] == ["0\n(all learned)", "0.1", "\N{INFINITY}\n(fixed)"]
    with pytest.raises(ValueError, match="with a score"):
        plots.choice([{**rows[0], "failed": "no"}])
