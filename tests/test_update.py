"""Laws of the posterior as a value that is told of more data: updates add up, weights are evidence, files bring it back."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bnnp
import scenarios
from bnnp.conjugate import condition
from bnnp.importance import log_mean_exp, normalise
from laws import INSTANCES, relative_error
from test_networks import answers, build, data, one_layer

LAWS = pytest.mark.parametrize("kind, shared", INSTANCES, ids=lambda value: str(value))
LAST = pytest.mark.parametrize("last_layer", ["exact", "amortised"])


def joined(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def everything(posterior: bnnp.Posterior, xt: Tensor, yt: Tensor) -> dict[str, Tensor]:
    return {
        **answers(posterior, xt, yt),
        "log_evidence": posterior.log_evidence,
        "ess": posterior.effective_sample_size,
        "particle weights": posterior.weights,
        "importance": posterior.log_importance,
        "reweighted": posterior.predict(xt, reweight=True).mean,
    }


@LAWS
@LAST
@pytest.mark.parametrize("kept", [True, False])
def test_two_updates_are_one(kind: str, shared: bool, last_layer: str, kept: bool) -> None:
    model, (first, a, b) = build(kind, shared, last_layer, residual=True), data((6, 4, 5))
    (xt, yt), size = data((6,), seed=2)[0], None if kept else 2
    start = model.condition(*first, num_samples=30, seed=1, context_batch_size=size)
    before = everything(start, xt, yt)
    want = everything(start.update(*joined(a, b)), xt, yt)
    for one, other in ((a, b), (b, a)):
        for key, value in everything(start.update(*one).update(*other), xt, yt).items():
            assert relative_error(value, want[key]) <= 1e-9, key
    for key, value in everything(start, xt, yt).items():
        assert torch.equal(value, before[key]), f"{key} of the old posterior changed"


@LAWS
@LAST
def test_an_update_conditions_the_last_layer_given_the_hidden_weights(kind: str, shared: bool, last_layer: str) -> None:
    """The particles' last layers are those of all points given the same hidden weights; evidence is the ratio of theirs."""
    model, (first, more) = build(kind, shared, last_layer), data((6, 4))
    start = model.condition(*first, num_samples=4, seed=1)
    new = start.update(*more)
    both = model.scale(bnnp.collate([joined(first, more)]))
    H = start.particles.architecture.hidden(both.x, start.particles.weights)
    given, problem = start.particles.given, model.chain.problem
    A, sites = problem(2, H, both, given)
    want = condition(given.core, A, sites, "weight")
    assert new.particles.last is not None
    for key in ("mean", "kl", "log_z"):
        assert relative_error(getattr(new.particles.last, key), getattr(want, key)) <= 1e-9
    A, own = problem(2, H, both, given, own=True)
    x, y = model.scale(bnnp.collate([first])).x, model.scale(bnnp.collate([first]))
    before = condition(given.core, *problem(2, start.particles.architecture.hidden(x, start.particles.weights), y, given, True), "weight")
    gain = condition(given.core, A, own, "weight").log_z - before.log_z - 4 * model.scaling.log_volume
    assert relative_error(new.gained, gain) <= 1e-9
    assert relative_error(new.weights, normalise(gain)[:, 0]) <= 1e-9
    assert relative_error(new.log_evidence, log_mean_exp(gain)[0][0]) <= 1e-9


@LAWS
def test_with_one_layer_online_is_batch_exactly_evidence_included(kind: str, shared: bool) -> None:
    model, tasks = one_layer(kind, shared), data((3, 4, 2), y_dim=1)
    (xt, yt), prior, s = data((5,), y_dim=1, seed=2)[0], next(iter(model.prior)), model.scaling
    whole = model.condition(*joined(*tasks), num_samples=3)
    online = model.condition(torch.zeros(0, 2), torch.zeros(0, 1), num_samples=3)
    for task in tasks:
        online = online.update(*task)
    want = answers(whole, xt, yt)
    for key, value in answers(online, xt, yt).items():
        assert relative_error(value, want[key]) <= 1e-9, key
    x, y = joined(*tasks)
    noise = float(model.likelihood.noise_std.detach())  # type: ignore[operator, union-attr]
    given = (s.x(x), s.y(y)[:, 0], prior.mean[0].detach(), prior.covariance()[0].detach(), noise, s.x(xt))
    exact = scenarios.bayesian_linear_regression(*given)["log_evidence"] - len(x) * s.y_scale.log().squeeze()
    for evidence in (online.log_evidence, online.elbo, whole.elbo, online.diagnose().log_evidence):
        assert relative_error(evidence, exact) <= 1e-9
    assert relative_error(online.effective_sample_size, torch.tensor(3.0)) <= 1e-12
    assert abs(float(online.diagnose().gap)) <= 1e-9


@LAST
def test_without_reweighting_particles_stay_equal_and_evidence_is_still_counted(last_layer: str) -> None:
    model, (first, a, b) = build(last_layer=last_layer), data((6, 1, 1))
    start, (xt, _) = model.condition(*first, num_samples=20), data((4,), seed=2)[0]
    paper = start.update(*a, reweight=False)
    assert float(paper.effective_sample_size) == pytest.approx(20.0)
    if last_layer == "exact":  # the sum of the log predictive densities of what arrived, as they were predicted
        want = start.predict(a[0]).log_prob(a[1], joint=True) + paper.predict(b[0]).log_prob(b[1], joint=True)
        assert relative_error(paper.update(*b, reweight=False).log_evidence, want) <= 1e-9
        weighted = start.update(*a)
        want = start.predict(a[0]).log_prob(a[1], joint=True) + weighted.predict(b[0]).log_prob(b[1], joint=True)
        assert relative_error(weighted.update(*b).log_evidence, want) <= 1e-9
    assert not torch.equal(paper.predict(xt).mean, start.update(*a).predict(xt).mean)


def test_weighted_particles_are_a_weighted_mixture() -> None:
    model, (first, more) = build(), data((3, 2))
    posterior, (xt, yt) = model.condition(*first, num_samples=5).update(*more), data((6,), seed=2)[0]
    p, w = posterior.predict(xt), posterior.weights.reshape(-1, 1, 1)
    mean, std = p.components
    assert float(posterior.effective_sample_size) < 4.9
    m = (w * mean).sum(0)
    assert relative_error(p.mean, m) <= 1e-9
    assert relative_error(p.std, (w * (std**2 + (mean - m) ** 2)).sum(0).sqrt()) <= 1e-9
    each = torch.distributions.Normal(mean, std)
    assert relative_error(p.log_prob(yt), (each.log_prob(yt).sum(-1) + w[..., 0].log()).logsumexp(0)) <= 1e-9
    assert relative_error(p.cdf(yt), (w * each.cdf(yt)).sum(0)) <= 1e-9
    assert relative_error((w * each.cdf(p.quantile(0.3))).sum(0), torch.full_like(m, 0.3)) <= 1e-9
    n = 40_000
    draws = p.sample(n, seed=1)
    assert float(((draws.mean(0) - p.mean) / (p.std / math.sqrt(n))).abs().max()) < 5
    pairs = (draws[: n // 2] - draws[n // 2 :]).abs().mean(0)
    assert relative_error((draws - yt).abs().mean(0) - 0.5 * pairs, p.crps(yt)) <= 0.05  # type: ignore[attr-defined]
    assert relative_error(draws.std(0), p.std) <= 0.03


def test_resampling_keeps_what_the_weights_said() -> None:
    model, (first, a, b) = build(likelihood=bnnp.Gaussian(0.3)), data((3, 3, 3))
    posterior, (xt, _) = model.condition(*first, num_samples=20_000).update(*a), data((4,), seed=2)[0]
    equal = posterior.resample(seed=4)
    assert float(equal.effective_sample_size) == pytest.approx(20_000) and float(posterior.effective_sample_size) < 15_000
    spread = float(posterior.predict(xt).epistemic_std.max())
    assert float((equal.predict(xt).mean - posterior.predict(xt).mean).abs().max()) < 0.05 * spread
    assert relative_error(equal.log_evidence, posterior.log_evidence) <= 1e-9
    after = abs(float(equal.update(*b).log_evidence - posterior.update(*b).log_evidence))
    assert after < 0.1
    whole, part = posterior.diagnose(), equal.diagnose()
    assert abs(float(whole.log_evidence - part.log_evidence)) < 5 * math.hypot(float(whole.log_evidence_se), float(part.log_evidence_se))
    assert math.isnan(float(part.elbo))
    with pytest.raises(ValueError, match="resampled"):
        _ = equal.elbo


def test_an_untouched_task_does_not_notice_the_others() -> None:
    model, tasks = build(), data((4, 5))
    start = model.condition([x for x, _ in tasks], [y for _, y in tasks], num_samples=6)
    more, mask, xt = bnnp.collate(data((3, 3), seed=5)), torch.tensor([[True] * 3, [False] * 3]), data((4,), seed=2)[0][0]
    updated = start.update(more.x, more.y, mask)
    for n in (4, 6, 15):
        new, old = updated.predict(xt).sample(n), start.predict(xt).sample(n)
        assert relative_error(new[:, 1], old[:, 1]) <= 1e-9 < relative_error(new[:, 0], old[:, 0])


@LAST
def test_refreshing_is_conditioning_afresh_on_everything(last_layer: str) -> None:
    model, (first, a, b), (xt, yt) = build(last_layer=last_layer), data((3, 2, 4)), data((4,), seed=2)[0]
    posterior = model.condition(*first, num_samples=4, seed=7).update(*a)
    want = answers(model.condition(*joined(first, a, b), num_samples=4, seed=7), xt, yt)
    for refreshed in (posterior.refresh(*b), posterior.update(*b).refresh()):
        for key, value in answers(refreshed, xt, yt).items():
            assert relative_error(value, want[key]) <= 1e-9, key
        assert float(refreshed.log_evidence) == 0.0 and int(refreshed.counts) == 9
    assert posterior.refresh(num_samples=9).num_samples == 9


def test_refreshing_uses_the_model_as_it_was() -> None:
    model, (first, more) = build(), data((3, 2))
    posterior = model.condition(*first, num_samples=4)
    want = posterior.refresh(*more).predict(more[0]).mean
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    assert torch.equal(posterior.refresh(*more).predict(more[0]).mean, want)


def test_many_tasks_are_updated_side_by_side() -> None:
    model, tasks, more = build(), data((4, 0, 6)), data((2, 3, 1), seed=5)
    (xt, yt), batch = data((4,), seed=2)[0], bnnp.collate(more)
    together = model.condition([x for x, _ in tasks], [y for _, y in tasks], num_samples=6).update(batch.x, batch.y, batch.mask)
    found = everything(together, xt, yt.expand(3, -1, -1))
    for t, (task, extra) in enumerate(zip(tasks, more, strict=True)):
        alone = everything(model.condition(*task, num_samples=6).update(*extra), xt, yt)
        for key in ("mean", "joint", "log_evidence", "ess", "elbo"):
            assert relative_error(found[key][t], alone[key]) <= 1e-9, key
        assert relative_error(found["particle weights"][:, t], alone["particle weights"]) <= 1e-9
    assert together.resample().num_samples == 6


class TestClassLabels:
    def test_the_last_layer_is_drawn_again(self) -> None:
        model, (first, a, b) = build(likelihood=bnnp.Bernoulli()), [(x, (y > 4).double()) for x, y in data((6, 4, 5))]
        start = model.condition(*first, num_samples=30, seed=1)
        one, two = start.update(*joined(a, b)), start.update(*a).update(*b)
        for got, want in zip(two.particles.weights, one.particles.weights, strict=True):
            assert relative_error(got, want) <= 1e-9
        assert relative_error(two.elbo, one.elbo) <= 1e-9 and relative_error(two.kl, one.kl) <= 1e-9
        gain = start.predict(a[0]).log_prob(a[1], joint=True)
        assert relative_error(start.update(*a, reweight=False).log_evidence, gain) <= 1e-9
        assert relative_error(two.gained, one.gained) <= 1e-9
        assert relative_error(two.gained, two.log_importance - start.log_importance) <= 1e-9
        want = model.condition(*joined(first, a, b), num_samples=30, seed=1)
        assert relative_error(two.refresh().predict(a[0]).mean, want.predict(a[0]).mean) <= 1e-9

    def test_a_streamed_posterior_says_that_it_lacks_the_points(self) -> None:
        model, (first, a) = build(likelihood=bnnp.Bernoulli()), [(x, (y > 4).double()) for x, y in data((6, 4))]
        streamed = model.condition(*first, num_samples=4, context_batch_size=2)
        kept = model.condition(*first, num_samples=4)
        assert relative_error(streamed.elbo, kept.elbo) <= 1e-9
        paper = [posterior.update(*a, reweight=False) for posterior in (streamed, kept)]
        assert relative_error(paper[0].predict(a[0]).mean, paper[1].predict(a[0]).mean) <= 1e-9
        with pytest.raises(ValueError, match="does not keep them"):
            _ = paper[0].elbo
        weighted = streamed.update(*a)  # particles stay as they are, so their likelihood is known
        assert all(torch.equal(one, other) for one, other in zip(weighted.particles.weights, streamed.particles.weights, strict=True))
        gain = streamed.predict(a[0]).log_prob(a[1], joint=True)
        assert relative_error(weighted.log_evidence, gain) <= 1e-9
        assert math.isfinite(float(weighted.elbo)) and math.isfinite(float(weighted.diagnose().log_evidence))

    @pytest.mark.parametrize("size", [None, 4])
    def test_weighted_particles_come_to_the_exact_posterior(self, size: int | None) -> None:
        """In blocks or one by one, a linear model with class labels: new points are not counted twice."""
        model = bnnp.BNNP(1, 1, hidden=(), prior="diagonal", likelihood=bnnp.Bernoulli(), net_hidden=(8,)).double()
        output = list(model._layers[0].net)[-1]  # type: ignore[arg-type]
        with torch.no_grad():
            output.bias[1] += 6.0  # type: ignore[index, operator]
        g = torch.Generator().manual_seed(0)
        x = torch.randn(24, 1, generator=g, dtype=torch.float64)
        y = (torch.rand(24, 1, generator=g) < (2 * x).sigmoid()).double()
        layer, grid = next(iter(model.prior)), torch.linspace(-2, 2, 5, dtype=torch.float64).unsqueeze(-1)
        at = (layer.mean[0].detach(), layer.covariance()[0].detach())
        exact, first = (scenarios.linear_bernoulli_evidence(x[:n], y[:n], grid, *at) for n in (24, 8))
        start = model.condition(x[:8], y[:8], num_samples=40_000, context_batch_size=size)
        want = float(exact["log_evidence"] - first["log_evidence"])
        for step in (16, 4):
            posterior = start
            for i in range(8, 24, step):
                posterior = posterior.update(x[i : i + step], y[i : i + step])
            mean = posterior.predict(grid, reweight=True).mean[:, 0]
            assert float((mean - exact["prob"]).abs().max()) < 0.02
            change = posterior.diagnose().log_evidence - start.diagnose().log_evidence
            assert abs(float(change) - want) < 0.1

    def test_a_residual_connection_is_no_target(self) -> None:
        model, (first, a) = build(hidden=(), residual=True, likelihood=bnnp.Bernoulli()), [(x, (y > 4).double()) for x, y in data((6, 4))]
        updated = model.condition(*first, num_samples=6, seed=1).update(*a, reweight=False)
        want = model.condition(*joined(first, a), num_samples=6, seed=1)
        assert relative_error(updated.predict(a[0]).mean, want.predict(a[0]).mean) <= 1e-9


@pytest.mark.parametrize("likelihood", [None, "bernoulli"])
@LAST
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_posterior_goes_on_where_it_was(
    likelihood: str | None, last_layer: str, size: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(last_layer=last_layer, likelihood=bnnp.Bernoulli() if likelihood else None).to(dtype)
    tasks = [(x, (y > 4).double()) if likelihood else (x, y) for x, y in data((6, 4, 5))]
    posterior = model.condition(*tasks[0], num_samples=8, seed=2, context_batch_size=size).update(*tasks[1]).resample().update(*tasks[2])
    posterior.save(tmp_path / "stream")
    model.save(tmp_path / "model")
    back = bnnp.load_posterior(tmp_path / "stream", bnnp.load(tmp_path / "model"))
    xt, more = data((4,), seed=2)[0][0], tasks[1]
    asked: list[Callable[[bnnp.Posterior], Tensor]] = [
        lambda p: p.predict(xt).mean,
        lambda p: p.predict(xt).sample(5),
        lambda p: p.update(*more).predict(xt).std,
        lambda p: p.update(*more).log_evidence,
        lambda p: p.kl,
        lambda p: p.counts,
    ]
    if size is None:
        asked += [lambda p: p.refresh().predict(xt).mean, lambda p: p.log_importance]
    for ask in asked:
        assert relative_error(ask(back), ask(posterior)) <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_posterior_of_another_model_is_refused_and_the_old_one_stays_usable(tmp_path: Path) -> None:
    model, task = build(), data((4,))[0]
    posterior = model.condition(*task, num_samples=3)
    want = posterior.predict(task[0]).mean
    posterior.save(tmp_path)
    other = build(seed=1)
    with pytest.raises(ValueError, match=r"posterior of this model.*Got one of another"):
        bnnp.load_posterior(tmp_path, other)
    with pytest.raises(FileNotFoundError, match=r"posterior\.json"):
        bnnp.load_posterior(tmp_path / "nowhere", model)
    for x, y, words in (
        (torch.zeros(2, 3), torch.zeros(2, 2), "2 columns"),
        (torch.zeros(2, 2), torch.zeros(2, 1), "y with 2 columns"),
        (torch.zeros(3, 2), torch.zeros(2, 2), "3 inputs for 2 outputs"),
        (torch.full((1, 2), math.nan), torch.zeros(1, 2), "finite numbers"),
        (torch.zeros(2, 3, 2), torch.zeros(2, 3, 2), "points of one task"),
    ):
        with pytest.raises(ValueError, match=words):
            posterior.update(x, y)
    with pytest.raises(ValueError, match="streamed context"):
        model.condition(*task, num_samples=3, context_batch_size=2).refresh(*task)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        bnnp.load_posterior(tmp_path, model)
    assert torch.equal(posterior.predict(task[0]).mean, want)


STREAM = """
import sys, torch, bnnp
folder = sys.argv[1]
model = bnnp.load(folder + "/model")
try:
    posterior = bnnp.load_posterior(folder + "/stream", model)
except FileNotFoundError:
    posterior = model.condition(torch.zeros(0, 2), torch.zeros(0, 2), num_samples=8)
while int(posterior.counts) < 2000:
    n = int(posterior.counts)
    x = torch.tensor([[0.01 * n, 1.0]], dtype=torch.float64)
    posterior = posterior.update(x, torch.sin(x))
    posterior.save(folder + "/stream")
    print(n, flush=True)
"""


def test_a_stream_killed_at_any_moment_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    model = build(hidden=(3,))
    model.save(tmp_path / "model")
    seen = 0
    for wait in (0.05, 0.2, 0.13):
        command, env = [sys.executable, "-c", STREAM, str(tmp_path)], {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            first = int(process.stdout.readline())
            assert first >= seen  # what was reported as saved is there, and the stream went on behind it
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split("\n")
        seen = max([first, *(int(line) for line in lines[:-1] if line)]) + 1
        assert int(bnnp.load_posterior(tmp_path / "stream", model).counts) >= seen
    back = bnnp.load_posterior(tmp_path / "stream", model)
    want = model.condition(torch.zeros(0, 2), torch.zeros(0, 2), num_samples=8)
    x = torch.stack([0.01 * torch.arange(int(back.counts), dtype=torch.float64), torch.ones(int(back.counts))], dim=-1)
    assert relative_error(back.predict(x).mean, want.update(x, torch.sin(x)).predict(x).mean) <= 1e-8
    assert json.loads((tmp_path / "stream" / "posterior.json").read_text())["points"] == int(back.counts)


def test_an_update_does_not_cost_more_the_more_was_seen() -> None:
    """The last layer is a sum over points: nothing of the size of what was seen is touched."""
    model, (x, y) = build(), data((3,))[0]
    posterior: Any = model.condition(*data((400,))[0], num_samples=3, context_batch_size=50)
    shapes = {tuple(t.shape) for t in posterior.particles.last.sums.tensors}
    assert {tuple(t.shape) for t in posterior.update(x, y).particles.last.sums.tensors} == shapes
    assert posterior.update(x, y).kept is None
