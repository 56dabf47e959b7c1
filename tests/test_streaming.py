"""Laws of streaming: batches of points, in any size and order, are the whole; so are gradients, exactly or on average."""

from __future__ import annotations

import gc
import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnnp
from bnnp import chain, draws, layers, networks
from bnnp.networks import BNNP
from bnnp.objectives import OBJECTIVES
from bnnp.streaming import Reservoir, Slices, Stream
from bnnp.tasks import Context, TaskBatch, collate
from laws import INSTANCES, relative_error
from test_networks import answers, build, data

LAWS = pytest.mark.parametrize("kind, shared", INSTANCES, ids=lambda value: str(value))
LAST = pytest.mark.parametrize("last_layer", ["exact", "amortised"])
ALL = pytest.mark.parametrize("objective", sorted(OBJECTIVES))
S = 3


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: bnnp.Posterior, other: bnnp.Posterior) -> None:
    xt, yt = data((6,), seed=2)[0]
    yt = yt if one.single else yt.expand(one.num_tasks, -1, -1)
    want = answers(one, xt, yt)
    for key, value in answers(other, xt, yt).items():
        assert relative_error(value, want[key]) <= 1e-9, key
    assert torch.equal(one.counts, other.counts)


@LAWS
@LAST
@pytest.mark.parametrize("hidden", [(5, 4), ()])
def test_batches_are_the_whole_context(kind: str, shared: bool, last_layer: str, hidden: tuple[int, ...]) -> None:
    model, (x, y) = build(kind, shared, last_layer, hidden=hidden, residual=hidden != ()), data((11,))[0]
    full = model.condition(x, y, num_samples=5, seed=3)
    for size in (1, 4, 100):
        same(full, model.condition(x, y, num_samples=5, seed=3, context_batch_size=size))
    order = torch.randperm(11, generator=generator())
    uneven = [(x[part], y[part]) for part in order.split([3, 0, 7, 1])]
    same(full, model.condition(batches_of(*uneven), num_samples=5, seed=3))
    same(full, model.condition(uneven, num_samples=5, seed=3))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    same(full, model.condition(loader, num_samples=5, seed=3))


@LAST
@pytest.mark.parametrize("points", [3, 11])
def test_layers_wider_than_the_canonical_rank_are_drawn_as_in_the_full_pass(
    points: int, last_layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer points than weights there is a draw in function space: the points are gathered."""
    for module in (draws, layers, chain):
        monkeypatch.setattr(module, "CANONICAL_RANK", 4)
    labels, (x, y) = build(likelihood=bnnp.Bernoulli()), data((points,))[0]
    one, other = (labels.condition(x, (y > 4).double(), num_samples=4, context_batch_size=size) for size in (None, 2))
    assert relative_error(one.predict(x).mean, other.predict(x).mean) <= 1e-9
    model, (x, y) = build(last_layer=last_layer), data((points,))[0]
    same(model.condition(x, y, num_samples=4), model.condition(x, y, num_samples=4, context_batch_size=2))


def test_tables_are_cut_by_position_and_flat_inputs_keep_their_tasks() -> None:
    pandas = pytest.importorskip("pandas")
    model, (x, y) = build(), data((40,))[0]
    frames = [pandas.DataFrame(part.numpy(), index=np.linspace(0, 100, 40)) for part in (x, y)]
    same(model.condition(x, y, num_samples=3), model.condition(*frames, num_samples=3, context_batch_size=7))
    flat, (x, y) = build(x_dim=1, y_dim=1), data((30,), 1, 1)[0]
    x, y, mask = x.reshape(3, 10), y.reshape(3, 10, 1), [[True] * 8 + [False] * 2] * 3
    whole, parts = (flat.condition(x, y, mask, num_samples=3, context_batch_size=size) for size in (None, 4))
    assert relative_error(parts.elbo, whole.elbo) <= 1e-9


def test_several_tasks_with_masks_are_streamed_together() -> None:
    model, tasks = build(), data((4, 0, 9))
    context = collate(tasks)
    full = model.condition([x for x, _ in tasks], [y for _, y in tasks], num_samples=4)
    same(full, model.condition(context.x, context.y, context.mask, num_samples=4, context_batch_size=4))
    same(full, model.condition([x for x, _ in tasks], [y for _, y in tasks], num_samples=4, context_batch_size=2))


def test_class_labels_are_streamed_with_one_more_pass() -> None:
    model, (x, y) = build(likelihood=bnnp.Bernoulli()), data((11,))[0]
    y = (y > 4).double()
    full, streamed = (model.condition(x, y, num_samples=5, context_batch_size=size) for size in (None, 3))
    for ask in (lambda p: p.elbo, lambda p: p.predict(x).mean, lambda p: p.log_importance):
        assert relative_error(ask(streamed), ask(full)) <= 1e-9


@LAST
def test_a_large_context_in_memory_is_worked_through_in_parts_and_kept(last_layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y), more = build(last_layer=last_layer), data((11,))[0], data((3,), seed=4)[0]
    full, parts, streamed = model.condition(x, y, num_samples=4), [], BNNP.streamed_particles

    def watched(self: BNNP, stream: Stream, *rest: Any, **how: Any) -> Any:
        parts.append(stream.shape)
        return streamed(self, stream, *rest, **how)

    monkeypatch.setattr(networks, "CONTEXT_BYTES", 8 * 4 * 6 * 3)
    monkeypatch.setattr(BNNP, "streamed_particles", watched)
    same(full, model.condition(x, y, num_samples=4))
    assert parts == [(4, 11)]
    same(full.refresh(*more), model.condition(x, y, num_samples=4).refresh(*more))


def test_an_empty_context_may_be_streamed() -> None:
    model = build()
    same(*(model.condition(np.zeros((0, 2)), np.zeros((0, 2)), num_samples=3, context_batch_size=size) for size in (None, 5)))


def test_what_can_be_sliced_is_read_in_slices(tmp_path: Path) -> None:
    """Memory maps, and variables of files that know their shape and give slices: never more than a batch of them."""
    model, (x, y) = build(), data((50,))[0]
    maps = []
    for name, part in (("x", x), ("y", y)):
        maps.append(np.memmap(tmp_path / name, dtype=np.float64, mode="w+", shape=tuple(part.shape)))
        maps[-1][:] = part.numpy()
    full = model.condition(x, y, num_samples=3)
    same(full, model.condition(*maps, num_samples=3, context_batch_size=7))

    class Variable:
        shape = tuple(x.shape)
        widest = 0

        def __init__(self, values: Tensor) -> None:
            self.values = values

        def __getitem__(self, at: slice) -> Any:
            part = np.ma.masked_invalid(self.values[at].numpy())
            self.widest = max(self.widest, len(part))
            return part

    variables = Variable(x), Variable(y)
    same(full, model.condition(*variables, num_samples=3, context_batch_size=7))
    assert variables[0].widest == 7
    y[20, 1] = math.nan  # netCDF readers mask missing values: that is no number either
    with pytest.raises(ValueError, match=r"batch 2 .*row 20 of the whole"):
        model.condition(*variables, num_samples=3, context_batch_size=7)


def test_memory_of_a_stream_does_not_grow_with_its_length() -> None:
    model, peaks = build().float(), []
    for batches in (2, 20, 200):  # the first is for what is only made once

        def read(batches: int = batches) -> Iterator[Any]:
            for i in range(batches):
                g = np.random.default_rng(i)
                yield g.normal(size=(1000, 2)).astype(np.float32), g.normal(size=(1000, 2)).astype(np.float32)

        gc.collect()
        tracemalloc.start()
        model.condition(read, num_samples=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 2**19  # what is streamed is 3 MiB more


@pytest.mark.parametrize("gradient", ["exact", "one_batch"])
def test_what_the_backward_pass_keeps_does_not_grow_with_the_context(gradient: str) -> None:
    """Counted in bytes that autograd saves, those of single batches included."""
    model, kept = build(), []
    for points in (40, 400):
        saved = [0]

        def pack(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved[0] += t.numel() * t.element_size()
            return t

        batch = TaskBatch(collate(data((points,))), collate(data((7,), seed=2)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            OBJECTIVES["pp_avi"](model, batch, S, generator(), context_batch_size=10, gradient=gradient)
        kept.append(saved[0])
    assert kept[0] == kept[1] > 0


def test_the_reservoir_is_a_fair_sample_of_observed_points() -> None:
    counts = torch.zeros(30)
    for seed in range(400):
        values, g = torch.arange(30.0).reshape(1, 30, 1), generator(seed)
        mask = values[..., 0] % 3 > 0
        parts = [Context(values[:, at], values[:, at], mask[:, at]) for at in (slice(0, 4), slice(4, 25), slice(25, 30))]
        reservoir = Reservoir.of(parts[0], 6, g)
        for part in parts[1:]:
            reservoir = reservoir.joined(part, 6, g)
        assert reservoir.points.counts.tolist() == [6]
        counts[reservoir.points.x[0, :, 0].long()] += 1
    assert float(counts[::3].sum()) == 0
    observed = counts[counts > 0]
    assert len(observed) == 20 and float((observed - 120).abs().max()) < 5 * math.sqrt(400 * 0.3 * 0.7)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(model: bnnp.BNNP, objective: str, batch: TaskBatch, **batches: Any) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad(set_to_none=True)
    value = OBJECTIVES[objective](model, batch, S, generator(), **batches)
    value.sum().backward()
    return value.detach(), [p.grad for p in model.parameters()]


def agree(got: tuple[Tensor, list[Tensor | None]], want: tuple[Tensor, list[Tensor | None]]) -> None:
    assert relative_error(got[0], want[0]) <= 1e-9
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert float((mine - theirs).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max()))


@ALL
@LAWS
@LAST
@pytest.mark.parametrize("sizes", [((3, 0, 2), (2, 9, 3)), ((7, 0, 12), (2, 4, 3))], ids=["fewer points than weights", "more"])
def test_the_exact_gradient_is_the_full_gradient(
    objective: str, kind: str, shared: bool, last_layer: str, sizes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    model = build(kind, shared, last_layer, hidden=(5, 4), residual=True)
    batch = TaskBatch(collate(data(sizes[0])), collate(data(sizes[1], seed=2)))
    want = gradients(model, objective, batch)
    for batches in ({"context_batch_size": 2}, {"context_batch_size": 5, "target_batch_size": 2}, {"target_batch_size": 1}):
        agree(gradients(model, objective, batch, **batches), want)


@ALL
def test_the_exact_gradient_of_a_drawn_last_layer(objective: str) -> None:
    model = build(likelihood=bnnp.Bernoulli())
    labels = [[(x, (y > 4).double()) for x, y in data(sizes, seed=seed)] for sizes, seed in (((11, 4), 1), ((2, 6), 2))]
    batch = TaskBatch(collate(labels[0]), collate(labels[1]))
    agree(gradients(model, objective, batch, context_batch_size=3, target_batch_size=4), gradients(model, objective, batch))


@ALL
@LAST
def test_the_one_batch_gradient_is_unbiased(objective: str, last_layer: str) -> None:
    """Enumerated over all draws of one batch for each layer; a single index for all layers would be biased."""
    model = build(last_layer=last_layer, hidden=(3,), y_dim=1, x_dim=1)
    batch = TaskBatch(collate(data((6,), 1, 1)), collate(data((3,), 1, 1, seed=2)))
    want = gradients(model, objective, batch)
    sums = 2  # one for each layer
    draws = itertools.product(range(3), repeat=sums)
    found = [gradients(model, objective, batch, context_batch_size=2, gradient=chosen) for chosen in draws]
    for value, _ in found:
        assert relative_error(value, want[0]) <= 1e-9
    for i, theirs in enumerate(want[1]):
        if theirs is not None:
            mean = torch.stack([g[i] for _, g in found]).mean(0)  # type: ignore[arg-type, misc]
            assert float((mean - theirs).abs().max()) <= 1e-9 * max(1.0, float(theirs.abs().max()))
    shared_index = [gradients(model, objective, batch, context_batch_size=2, gradient=(b,) * sums) for b in range(3)]
    biased = [torch.stack([g[i] for _, g in shared_index]).mean(0) - t for i, t in enumerate(want[1]) if t is not None]  # type: ignore[arg-type, misc]
    assert max(float(b.abs().max()) for b in biased) > 1e-6


def test_a_random_batch_leaves_the_noise_as_it_is() -> None:
    model, batch = build(), TaskBatch(collate(data((12,))), collate(data((3,), seed=2)))
    exact, one = (gradients(model, "pp_avi", batch, context_batch_size=2, gradient=how) for how in ("exact", "one_batch"))
    assert relative_error(one[0], exact[0]) <= 1e-9
    assert any(relative_error(a, b) > 1e-3 for a, b in zip(one[1], exact[1], strict=True) if a is not None and b is not None)


def test_batches_are_drawn_anew_where_there_is_no_noise_to_draw() -> None:
    model, batch, g = build(hidden=()), TaskBatch(collate(data((12,))), collate(data((3,), seed=2))), generator()
    found = set()
    for _ in range(40):
        model.zero_grad(set_to_none=True)
        OBJECTIVES["avi"](model, batch, S, g, context_batch_size=4, gradient="one_batch").sum().backward()
        grad = model.likelihood.raw_noise.grad
        assert isinstance(grad, Tensor)
        found.add(round(float(grad.sum()), 6))
    assert len(found) == 3
    with pytest.raises(ValueError, match="context_batch_size as a positive"):
        OBJECTIVES["avi"](model, batch, S, g, context_batch_size=-2)


def test_training_in_batches_is_training() -> None:
    def trained(**batches: Any) -> list[Tensor]:
        model = bnnp.BNNP(1, 1, hidden=(6,), seed=1).double()
        tasks = [(torch.linspace(-1, 1, 20).unsqueeze(-1), torch.sin(3 * torch.linspace(-1, 1, 20) + i)) for i in range(8)]
        bnnp.meta_train(model, tasks, steps=5, progress=False, context=(10, 12), **batches)
        return list(model.parameters())

    full = trained()
    for batches in ({"context_batch_size": 3}, {"context_batch_size": 4, "target_batch_size": 3}):
        assert all(relative_error(a, b) <= 1e-7 for a, b in zip(trained(**batches), full, strict=True))
    assert not torch.equal(trained(context_batch_size=3, gradient="one_batch")[0], full[0])


# --- predictions ------------------------------------------------------------------------------------------------------


@LAWS
@LAST
@pytest.mark.parametrize("size", [1, 4, 50])
def test_predictions_in_batches_are_predictions(kind: str, shared: bool, last_layer: str, size: int) -> None:
    posterior = build(kind, shared, last_layer).condition(*data((5,))[0], num_samples=4)
    (xt, yt), mask = data((11,), seed=2)[0], torch.arange(11) % 4 > 0
    whole, parts = posterior.predict(xt), posterior.predict(xt, batch_size=size)
    asked: list[Callable[[Any], Tensor]] = [
        lambda p: p.mean,
        lambda p: p.std,
        lambda p: p.epistemic_std,
        lambda p: p.log_prob(yt, mask=mask),
        lambda p: p.log_prob(yt, joint=True, mask=mask),
        lambda p: p.quantile(0.2),
        lambda p: p.cdf(yt),
        lambda p: p.crps(yt),
        lambda p: p.components[1],
        lambda p: p.sample(6, seed=1),
    ]
    for ask in asked:
        assert relative_error(ask(parts), ask(whole)) <= 1e-9


def test_the_joint_density_of_many_targets_makes_no_matrix_of_points_by_points(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnnp import conjugate

    widest, factorise = [0], conjugate.cholesky

    def watched(M: Tensor) -> Tensor:
        widest[0] = max(widest[0], M.shape[-1])
        return factorise(M)

    monkeypatch.setattr(conjugate, "cholesky", watched)
    (xt, yt), model = data((300,), seed=2)[0], build()
    p = model.condition(*data((2,))[0], num_samples=3).predict(xt)
    joint = p.log_prob(yt, joint=True)
    batch = TaskBatch(collate(data((2,))), collate(data((300,), seed=2)))
    for objective in OBJECTIVES.values():  # in training the last layer starts in function space
        objective(model, batch, 2, generator())
    assert widest[0] <= 6 and bool(joint.isfinite())


# --- bad input ---------------------------------------------------------------------------------------------------------


def batches_of(*parts: Any) -> Callable[[], Iterator[Any]]:
    return lambda: iter(parts)


def test_bad_streams_are_refused_in_words() -> None:
    model, ((x, y),) = build(), data((6,))
    with pytest.raises(TypeError, match=r"read several times.*generator"):
        model.condition((pair for pair in [(x, y)]), num_samples=2)
    with pytest.raises(ValueError, match="at least one batch"):
        model.condition(lambda: iter(()), num_samples=2)
    with pytest.raises(ValueError, match=r"batch 1 \(counted from 0, starting at row 6\): Expected xc with 2 columns.*Got shape \(6, 3\)"):
        model.condition(batches_of((x, y), (torch.zeros(6, 3), y)), num_samples=2)
    with pytest.raises(ValueError, match=r"batch 0 .*xc with 2 columns"):
        model.condition(batches_of((torch.zeros(6, 3), y)), num_samples=2)
    with pytest.raises(TypeError, match=r"batch 0: Expected a pair \(x, y\).*Got Tensor"):
        model.condition(batches_of(x), num_samples=2)
    with pytest.raises(ValueError, match=r"batch 1: Expected points of one task, without a task axis"):
        model.condition(batches_of((x, y), (x.expand(2, -1, -1), y.expand(2, -1, -1))), num_samples=2)
    for extra in ({"context_batch_size": 3}, {"mask": [True] * 6}):
        with pytest.raises(ValueError, match="Got both"):
            model.condition(batches_of((x, y)), **extra)
    with pytest.raises(TypeError, match=r"function to return batches.*NoneType"):
        model.condition(lambda: None, num_samples=2)
    with pytest.raises(TypeError, match="Got dict and no yc"):
        model.condition({"x": x, "y": y}, num_samples=2)
    with pytest.raises(TypeError, match="Got Tensor and no yc"):
        model.condition(x, context_batch_size=2)
    with pytest.raises(ValueError, match=r"context_batch_size as a positive integer. Got 0"):
        model.condition(x, y, context_batch_size=0)
    with pytest.raises(ValueError, match="Got 6 points in x, 5 points in y"):
        model.condition(x, y[:5], context_batch_size=3)
    with pytest.raises(TypeError, match="Expected xc and yc"):
        model.condition(x)


def test_a_missing_number_in_the_900th_batch_is_named_by_its_row() -> None:
    x, y = torch.zeros(9050, 2), torch.zeros(9050, 2)
    y[8993, 1] = math.nan
    with pytest.raises(
        ValueError, match=r"batch 899 \(counted from 0, starting at row 8990\).*yc.*nan at index \(3, 1\), row 8993 of the whole"
    ):
        build().condition(x, y, num_samples=2, context_batch_size=10)


@pytest.mark.parametrize("change", ["values", "shorter", "longer", "empty"])
def test_batches_that_change_between_passes_are_noticed(change: str) -> None:
    model, ((x, y),), passes = build(), data((6,)), itertools.count()

    def read() -> Iterator[Any]:
        first = next(passes) == 0
        if not first and change == "empty":
            return
        yield x, y + (0.0 if first or change != "values" else 1e-9)
        if first or change != "shorter":
            yield x, y
        if not first and change == "longer":
            yield x, y

    words = {
        "values": "other data in batch 0",
        "shorter": "1 batches instead of 2",
        "longer": "other data in batch 2",
        "empty": "Got nothing",
    }
    with pytest.raises(ValueError, match=f"same batches.*{words[change]}"):
        model.condition(read, num_samples=2)


def test_slices_and_streams_check_their_settings() -> None:
    assert [len(part[1]) for part in Slices(np.zeros((5, 1)), np.zeros((5, 1)), size=2)] == [2, 2, 1]
    with pytest.raises(ValueError, match=r"gradient as 'exact' or 'one_batch'. Got 'mean'"):
        Stream(list, "mean")
    tasks = [(torch.zeros(4, 1), torch.arange(4.0) + i) for i in range(3)]
    for setting, words in (
        ({"gradient": "mean"}, "gradient as"),
        ({"context_batch_size": 0}, "context_batch_size as a positive"),
        ({"gradient": "one_batch"}, "there are no batches"),
    ):
        with pytest.raises(ValueError, match=words):
            bnnp.meta_train(bnnp.BNNP(1, 1, hidden=(3,)), tasks, steps=1, **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="last_layer='exact' with iw_avi"):
        bnnp.meta_train(bnnp.BNNP(1, 1, hidden=(3,), last_layer="amortised"), tasks, steps=1, objective="iw_avi")


def test_progress_is_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    model, ((x, y),) = build(), data((6,))
    model.condition(x, y, num_samples=2, context_batch_size=3)
    assert capsys.readouterr().err == ""
    model.condition(x, y, num_samples=2, context_batch_size=3, progress=True)
    assert "pass 1 of 3" in capsys.readouterr().err
