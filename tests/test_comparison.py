"""A comparison gives every engine the same problem, scores what it finds as anything else is scored, and says what each row was."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws import randn
from torch import Tensor

import bnnp
from bnnp import plots_comparison
from bnnp.comparison import Comparison, Result, Row
from bnnp.evaluation import split_tasks
from bnnp.inference import Draws, Engine, Target, functional
from bnnp.plots import save_figure
from bnnp.seeds import seeded

CALLS: list[dict[str, Any]] = []
"""What the stand-in was built with."""


@dataclasses.dataclass(frozen=True)
class State:
    eps: Tensor
    gradients: int
    generator: torch.Generator


def build(target: Target, *, power: float = 1.0, start: Tensor | None = None) -> Engine:
    """Importance sampling from the prior: an engine without tuning, the same draws for every task."""
    CALLS.append({"power": power, "start": start, "target": target})

    def init(seed: int) -> State:
        return State(torch.zeros(0), 0, seeded(seed, "stand-in"))

    def sample(state: State, n: int, seed: int) -> Draws:
        eps = drawn(n, target.dim, seed).unsqueeze(1).expand(n, target.num_tasks, -1)
        return Draws(eps, power * target.log_likelihood(eps))

    def report(state: State) -> dict[str, Tensor]:
        T = target.num_tasks
        return {"rhat": 1 + 0.1 * torch.arange(T), "ess_bulk": 100.0 - torch.arange(T), "divergences": torch.ones(T)}

    return Engine("stand-in", target, 2, init, lambda state: dataclasses.replace(state, gradients=state.gradients + 5), sample, report)


def broken(target: Target, *, start: Tensor | None = None) -> Engine:
    raise RuntimeError("this engine has no wheels")


def drawn(n: int, dim: int, seed: int) -> Tensor:
    return torch.randn(n, dim, generator=seeded(seed, "stand-in draws"), dtype=torch.float64)


def made(seed: int = 0, **settings: Any) -> bnnp.BNNP:
    model = bnnp.BNNP(1, 1, **{"hidden": (4,), **settings}).double()
    g = seeded(seed, "made")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    return model


def problems(sizes: tuple[tuple[int, int], ...] = ((5, 3), (2, 4), (0, 2))) -> list[tuple[Tensor, ...]]:
    g = seeded(0, "problems")
    return [tuple(randn(size, 1, generator=g) for size in (n, n, m, m)) for n, m in sizes]


@pytest.mark.parametrize("collapse", [False, True])
def test_a_row_is_scored_as_a_loop_over_tasks_would(collapse: bool) -> None:
    model, tasks = made(), problems()
    found = bnnp.compare(model, tasks, [Row("x", build)], collapse=collapse, num_samples=6, seed=3)["x"]
    assert found.failed is None and found.collapsed is collapse and found.num_samples == 6
    for t, (xc, yc, xt, yt) in enumerate(tasks):
        F = functional(model, xc, yc, collapse=collapse)
        eps = drawn(6, F.dim, 3)
        predictive = F.predict(eps, xt, F.log_likelihood(eps))
        assert found.per_task["joint_log_density"][t] == pytest.approx(float(predictive.log_prob(yt, joint=True)) / len(yt))
        assert found.per_task["marginal_log_density"][t] == pytest.approx(float(predictive.log_prob(yt).mean()))
        assert found.per_task["crps"][t] == pytest.approx(float(predictive.crps(yt).mean()), rel=1e-4)
    joint = torch.tensor(found.per_task["joint_log_density"])
    assert found.scores["joint_log_density"] == pytest.approx((float(joint.mean()), float(joint.std()) / 3**0.5))
    assert found.gradients == 10 and found.seconds > 0 and found.seconds_per_task == pytest.approx(found.seconds / 3)


@pytest.mark.parametrize("likelihood", [None, bnnp.Gaussian(0.3, learn_noise=False)])
def test_where_every_engine_is_exact_all_rows_agree(likelihood: bnnp.Likelihood | None) -> None:
    """One layer that is integrated out: nothing is left to infer, so rows differ only if they were not given the same problem."""
    model, tasks = made(hidden=()), problems()
    found = bnnp.compare(model, tasks, ["amortised", Row("x", build)], likelihood=likelihood, num_samples=3)
    for name, values in found["amortised"].per_task.items():
        assert found["x"].per_task[name] == pytest.approx(values, rel=1e-6, abs=1e-8), name
    assert found.difference("x") == pytest.approx((0.0, 0.0), abs=1e-8)
    noise = 0.3 if likelihood else float(model.noise_std)
    for row in found.rows:
        assert row.posterior is not None
        predictive = row.posterior.predict(torch.zeros(1, 1).double())
        torch.testing.assert_close((predictive.std**2 - predictive.epistemic_std**2).sqrt(), torch.full((3, 1, 1), noise).double())


def test_engines_find_the_answer_where_it_is_known() -> None:
    """Bayesian linear regression with all weights drawn: the forward pass is exact, evidence and predictions."""
    rows = ["amortised", Row("hmc", "hmc", settings={"warmup": 50, "draws": 100}), Row("smc", "smc", settings={"num_particles": 50})]
    noise = bnnp.Gaussian(1.0, learn_noise=False)
    found = bnnp.compare(made(hidden=()), problems(((6, 5), (3, 5))), rows, likelihood=noise, collapse=False, num_samples=200)
    assert [row.failed for row in found.rows] == [None] * 3
    assert [row.collapsed for row in found.rows] == [True, False, False]
    exact = found["amortised"]
    assert exact.diagnostics["elbo"] == pytest.approx(exact.diagnostics["log_evidence"], abs=1e-6)
    smc = found["smc"].diagnostics
    for t in range(2):
        assert abs(smc["log_evidence"][t] - exact.diagnostics["elbo"][t]) < 5 * smc["log_evidence_se"][t] + 0.01
        for name in ("hmc", "smc"):  # of 200 draws a density's standard error is a few hundredths
            assert found[name].per_task["marginal_log_density"][t] == pytest.approx(exact.per_task["marginal_log_density"][t], abs=0.15)
            assert found[name].per_task["rmse"][t] == pytest.approx(exact.per_task["rmse"][t], abs=0.15)
    assert max(found["hmc"].diagnostics["rhat"]) < 1.1 and found["hmc"].gradients > 600 > exact.gradients


def test_rows_have_priors_starts_settings_and_sizes_of_their_own() -> None:
    CALLS.clear()
    model, tasks = made(), problems()
    rows = [
        Row("own", build, prior=model, warm_start=True),
        {"name": "fixed", "engine": build, "settings": {"power": 0.5}, "num_samples": 7, "collapse": False},
        {"name": "borrowed", "engine": build, "prior": made(seed=1)},
    ]
    found = bnnp.compare(model, tasks, rows, prior="diagonal", num_samples=4, settings={"test_comparison": {"power": 2.0}}, shown=0)
    assert [row.failed for row in found.rows] == [None] * 3
    assert [row.prior for row in found.rows] == ["learned", "diagonal, fixed", "of another model"]
    assert [row.num_samples for row in found.rows] == [4, 7, 4]
    assert [row.collapsed for row in found.rows] == [True, False, True]
    assert [call["power"] for call in CALLS] == [2.0, 0.5, 2.0]
    own, fixed, borrowed = (call["target"].batched for call in CALLS)
    torch.testing.assert_close(own.layers[0].dense(), next(iter(model.prior)).dense())
    assert not torch.allclose(own.layers[0].dense(), fixed.layers[0].dense())
    torch.testing.assert_close(borrowed.layers[0].dense(), next(iter(rows[2]["prior"].prior)).dense())
    contexts = [xc for xc, *_ in tasks], [yc for _, yc, *_ in tasks]
    start = functional(model, *contexts, collapse=True).start(model.condition(*contexts, num_samples=4), 64)
    torch.testing.assert_close(CALLS[0]["start"], start)
    assert [call["start"] is None for call in CALLS] == [False, True, True]
    text = str(found)
    assert (
        "started from the amortised posterior: own" in text
        and "prior learned: own; diagonal, fixed: fixed; of another model: borrowed" in text
    )
    assert "drawn: fixed (7 draws)" in text and "a poor estimate" in text


def test_the_amortised_row_is_the_models_own_posterior() -> None:
    model, tasks = made(), problems()
    row = bnnp.compare(model, tasks, ["amortised"], num_samples=30, seed=2)["amortised"]
    scores = bnnp.evaluate(model, tasks, num_samples=30, seed=2)
    assert row.per_task == {name: pytest.approx(values.tolist()) for name, values in scores.per_task.items()}
    d = model.condition([t[0] for t in tasks], [t[1] for t in tasks], num_samples=30, seed=2).diagnose()
    for name in ("elbo", "log_evidence", "log_evidence_se", "pareto_k"):
        torch.testing.assert_close(torch.tensor(row.diagnostics[name]), getattr(d, name).float(), equal_nan=True)
    mixed = bnnp.BNNP(1, 1, hidden=(4,), prior=bnnp.Prior("mixture"))
    assert bnnp.compare(mixed, tasks, ["amortised"], num_samples=3)["amortised"].failed is None
    failed = bnnp.compare(model, tasks, ["amortised"], prior="diagonal")["amortised"].failed
    assert failed is not None and "inference networks do not know" in failed


def test_an_engine_that_fails_is_a_row_with_its_message() -> None:
    found = bnnp.compare(
        made(), problems(), ["amortised", broken, Row("fine", build), Row("wrong", build, settings={"x": 1})], num_samples=3
    )
    assert found["test_comparison"].failed == "RuntimeError: this engine has no wheels"
    assert "Expected settings of the engine among power. Got x." in str(found["wrong"].failed)
    assert found["fine"].failed is None
    assert "test_comparison failed: RuntimeError: this engine has no wheels" in str(found)
    assert found.best().name in ("amortised", "fine")
    assert math.isnan(found.difference("wrong")[0])


def test_an_engine_is_named_after_its_module() -> None:
    assert Row("", functools.partial(functools.partial(build, power=2.0), power=3.0)).engine_name == "test_comparison"
    assert Row("", "nuts").engine_name == "nuts"


def test_splits_are_those_of_a_seed_and_masks_are_kept() -> None:
    model = made()
    pairs = [(x, y) for x, y, *_ in problems(((6, 1), (9, 1)))]
    split = bnnp.compare(model, split_tasks(pairs, 0.5, seed=4), ["amortised"], num_samples=3, seed=4)
    whole = bnnp.compare(model, pairs, ["amortised"], context_fraction=0.5, num_samples=3, seed=4)
    assert split["amortised"].per_task == whole["amortised"].per_task
    xc, yc, xt, yt = problems(((6, 3),))[0]
    keep = torch.tensor([True, False, True, True, False, True])
    masked = bnnp.compare(model, [(xc, yc, keep, xt, yt, None)], [Row("x", build)], num_samples=3)["x"]
    dropped = bnnp.compare(model, [(xc[keep], yc[keep], xt, yt)], [Row("x", build)], num_samples=3)["x"]
    assert masked.per_task == dropped.per_task


def test_rows_that_take_batches_work_on_all_layers() -> None:
    def batched(target: Target, *, batch_size: int | None = None) -> Engine:
        return build(target)

    rows = [Row("a", batched), Row("b", batched, settings={"batch_size": 2}), Row("c", batched, settings={"batch_size": 2}, collapse=True)]
    found = bnnp.compare(made(), problems(), [*rows, "amortised"], num_samples=3, collapse=None)
    assert [row.collapsed for row in found.rows] == [True, False, True, True]
    assert "last layer integrated out: all but b (3 draws)" in str(found) and "last layer drawn: b (3 draws)" in str(found)


def test_class_labels_have_scores_of_their_own() -> None:
    model = made(likelihood=bnnp.Bernoulli())
    tasks = [(xc, (yc > 0).double(), xt, (yt > 0).double()) for xc, yc, xt, yt in problems()]
    found = bnnp.compare(model, tasks, ["amortised", Row("x", build)], num_samples=4)
    assert [row.failed for row in found.rows] == [None, None]
    assert [row.collapsed for row in found.rows] == [False, False]
    assert "accuracy" in str(found) and "CRPS" not in str(found)
    assert found.best("brier").scores["brier"][0] == min(row.scores["brier"][0] for row in found.rows)


def example() -> Comparison:
    def row(name: str, values: list[float], **more: Any) -> Result:
        mean = sum(values) / len(values)
        return Result(name, name, "learned", False, True, 16, {"joint_log_density": (mean, 0.1), "crps": (-mean, 0.01)},
                      {"joint_log_density": values}, seconds=more.pop("seconds"), **more)  # fmt: skip

    diagnostics = {
        "rhat": [1.0, 1.2, math.nan],
        "ess_bulk": [9.0, 5.0, 7.0],
        "divergences": [1.0, 0.0, 2.0],
        "elbo": [-1.0, -2.0, -3.0],
    }
    rows = [
        row("first", [1.0, 2.0, 3.0], seconds=0.5),
        row("second", [2.0, 2.0, 4.0], seconds=10.0, gradients=100, diagnostics=diagnostics),
        Result("third", "third", "learned", False, False, 8, failed="ValueError: no"),
    ]
    return Comparison(rows, "first", 3)


def test_differences_are_paired_by_task_and_diagnostics_are_the_worst() -> None:
    found = example()
    mean, se = found.difference("second")
    assert mean == pytest.approx(2 / 3) and se == pytest.approx(torch.tensor([1.0, 0.0, 1.0]).std().item() / 3**0.5)
    assert found.difference("first", reference="second")[0] == pytest.approx(-2 / 3)
    second = found["second"]
    assert [second.diagnostic(name) for name in ("rhat", "ess_bulk", "divergences", "elbo")] == [1.2, 5.0, 3.0, -2.0]
    assert math.isnan(second.diagnostic("pareto_k"))
    assert found.best().name == "second" and found.best("crps").name == "second" and found.best("seconds").name == "first"
    cells = [line.split() for line in found.table().splitlines()]
    assert ["second", "2.667", "(0.100)", "-0.667", "(0.333)", "-2.667", "(0.010)"] in cells
    assert ["second", "10", "3.3", "100", "1.200,", "1.100", "5,", "7", "3", "-2.00"] in cells
    assert "third failed: ValueError: no" in found.table()
    with pytest.raises(ValueError, match=r"Expected a score that some row has: crps, .*Got 'luck'"):
        found.best("luck")
    with pytest.raises(KeyError, match="Expected one of first, second, third"):
        found["fourth"]


def test_a_comparison_is_saved_and_read(tmp_path: Path) -> None:
    model, tasks = made(), problems()
    for found in (example(), bnnp.compare(model, tasks, ["amortised", broken], num_samples=3)):
        back = Comparison.load(found.save(tmp_path / "new" / "comparison.json"))
        assert str(back) == str(found)
        assert back.to_dict() == found.to_dict() and back.reference == found.reference
    assert back.rows[0].posterior is None and len(back.rows[0].curves) == 3
    assert (tmp_path / "new" / "comparison.json").stat().st_size < 60_000
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="Expected a comparison that was saved in"):
        Comparison.load(tmp_path / "other.json")


def test_what_is_infinite_is_not_forgotten(tmp_path: Path) -> None:
    found = example()
    found["second"].diagnostics["rhat"][1] = math.inf
    back = Comparison.load(found.save(tmp_path / "comparison.json"))
    assert back["second"].diagnostic("rhat") == math.inf and "inf" in str(back)


def test_finished_rows_are_not_run_again(tmp_path: Path) -> None:
    CALLS.clear()
    model, tasks = made(), problems()

    def go(**more: Any) -> Comparison:
        options = {"folder": tmp_path, "num_samples": 3, **more}
        return bnnp.compare(model, tasks, ["amortised", Row("a row", build), Row("bad", broken)], **options)

    first = go()
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["a-row.json", "amortised.json"]
    again = go()
    assert len(CALLS) == 1 and str(again) == str(first)
    assert (tmp_path / "a-row.state").is_dir()  # where a run that is stopped goes on
    assert again["bad"].failed is not None
    (tmp_path / "a-row.json").unlink()
    assert go()["a row"].per_task == first["a row"].per_task and len(CALLS) == 2
    for change in ({"seed": 1}, {"num_samples": 4}, {"likelihood": bnnp.Gaussian(0.1)}, {"settings": {"test_comparison": {"power": 3.0}}}):
        with pytest.raises(ValueError, match=r"to be of this model, these tasks and settings\. Got another"):
            go(**change)
    tasks[0] = (*tasks[0][:3], tasks[0][3] + 1)
    with pytest.raises(ValueError, match="Got another"):
        go()
    assert all(json.loads(path.read_text())["key"] for path in tmp_path.glob("*.json"))


def test_a_row_with_other_settings_bound_to_its_engine_is_another(tmp_path: Path) -> None:
    def go(power: float) -> Comparison:
        row = Row("bound", functools.partial(build, power=power))
        return bnnp.compare(made(), problems(), [row], num_samples=3, folder=tmp_path)

    assert go(1.0)["bound"].per_task == go(1.0)["bound"].per_task
    with pytest.raises(ValueError, match="Got another"):
        go(2.0)


@pytest.mark.parametrize(
    ("engines", "more", "words"),
    [
        ([], {}, "Expected at least one engine"),
        (["amortised", "amortised"], {}, "each row with a name of its own"),
        ([Row("a b", build), Row("a-b", build)], {}, "each row with a name of its own"),
        (["guesswork"], {}, "Expected an engine of .*amortised.*Got 'guesswork'"),
        ([3], {}, "Expected an engine as a name"),
        ([{"name": "x", "engin": build}], {}, "Expected a row with an engine"),
        (["amortised"], {"reference": "nuts"}, "Expected reference as one of"),
        (["amortised"], {"settings": {"nuts": {}}}, r"Expected settings of engines that run. Got those of \['nuts'\]"),
        (["amortised"], {"num_samples": 0}, "Expected num_samples as a positive integer"),
    ],
)
def test_wrong_questions_are_named(engines: list[Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        bnnp.compare(made(), problems(), engines, **more)


def test_pictures_are_drawn_of_what_was_kept(tmp_path: Path) -> None:
    model, tasks = made(), problems()
    found = bnnp.compare(model, tasks, ["amortised", Row("x", build), Row("bad", broken)], num_samples=4, shown=2)
    back = Comparison.load(found.save(tmp_path / "c.json"))
    curve = found["x"].curves[1]
    assert found["x"].posterior is not None
    predictive = found["x"].posterior.predict(torch.tensor(curve["x"]).double().unsqueeze(-1))
    torch.testing.assert_close(torch.tensor(curve["mean"]).double(), predictive.mean[1, :, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(curve["upper"]).double(), predictive.quantile(0.95)[1, :, 0], rtol=1e-3, atol=1e-3)
    assert curve["xt"] == pytest.approx(tasks[1][2].flatten().tolist(), rel=1e-4) and len(curve["samples"]) == 5
    x = torch.linspace(-1, 1, 7)
    figures = {
        "scores": back.plot_scores(),
        "per_task": back.plot_scores("crps", per_task=True, title="title"),
        "predictions": back.plot_predictions(truth=[(x, x), None]),
        "one": back.plot_predictions(["x"]),
    }
    for name, figure in figures.items():
        assert save_figure(figure, tmp_path / f"{name}.png", dpi=50).stat().st_size > 4000
    panels = [ax for ax in figures["predictions"].axes if ax.has_data()]
    assert len(panels) == 4 and "joint log density" in panels[0].get_title()
    with pytest.raises(ValueError, match="Expected a score that some row has"):
        found.plot_scores("brier")
    with pytest.raises(ValueError, match="one input and one output"):
        bnnp.compare(model, tasks, ["amortised"], num_samples=3, shown=0).plot_predictions()


def test_names_stand_apart_and_scores_far_behind_at_the_edge() -> None:
    times = [0.1, 1.0, 1.02, 1.05, 1.1, 40.0, 300.0]
    means = [0.5, 0.52, 0.521, 0.523, 0.5, 0.55, -30.0]
    points = [{"name": f"engine {i}", "seconds": s, "mean": m, "se": 0.01} for i, (s, m) in enumerate(zip(times, means, strict=True))]
    fig = plots_comparison.scores(points)
    fig.draw_without_rendering()
    (ax,) = fig.axes
    assert "far off: \N{MINUS SIGN}30.00" in ax.texts[-1].get_text() and ax.get_ylim()[0] > -5
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [(i, j) for i in range(len(boxes)) for j in range(i) if boxes[i].overlaps(boxes[j])] == []
    frame = fig.bbox
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    with pytest.raises(ValueError, match="Expected at least one engine"):
        plots_comparison.scores([])
