"""Meta-training: learn the prior and the inference networks from a collection of tasks, in one readable loop.

A step takes a few tasks, cuts each at random into context and target, and follows the gradient of the objective. Everything that
a step depends on (parameters, optimiser, generators, the number of the step) is in `TrainState`, so a run that was stopped goes on
bit for bit as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnp.checkpoint import comparable, model_header, read_bundle, write_atomically, write_bundle
from bnnp.intake import check_contexts, digest_of, looked_at, read_collections, sizes_of
from bnnp.linalg import NotPositiveDefiniteError, NumericalWarning
from bnnp.networks import BNNP
from bnnp.objectives import OBJECTIVES
from bnnp.progress import ProgressLine
from bnnp.seeds import check_count, seeded
from bnnp.settings import Settings, context_range
from bnnp.tasks import Task, TaskBatch, collate, split

__all__ = ["TrainResult", "TrainState", "TrainingError", "check_run", "meta_train"]

MAX_BAD_STEPS = 10


class TrainingError(RuntimeError):
    """Say that training cannot go on, and what to change."""


@dataclass
class TrainState:
    """Hold what changes from step to step, beside the model and the optimiser."""

    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """Report a finished run.

    Arguments:
        history: one record for each logged step; the log file has the same, and the seconds spent.
        best_step: the step whose parameters the model has now.
        best_score: validation score there (mean log predictive density per target point), or None without validation.
        skipped: steps that were left out because loss or gradient was not finite.
        seconds: time spent.
    """

    history: list[dict[str, Any]]
    best_step: int
    best_score: float | None
    skipped: int
    seconds: float


def meta_train(
    model: BNNP,
    tasks: Sequence[Any],
    *,
    validation: Sequence[Any] | float | None = None,
    objective: str = "pp_avi",
    beta: float = 1.0,
    steps: int = 2000,
    batch_size: int = 5,
    num_samples: int = 8,
    learning_rate: float = 3e-3,
    final_learning_rate: float = 1e-4,
    context: tuple[float, float] | tuple[int, int] = (0.1, 0.6),
    prior_mean_from_step: int = 0,
    prior_scale_from_step: int = 0,
    clip_norm: float | None = 100.0,
    per_point: bool = False,
    shrinkage: float = 0.0,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    validate_every: int | None = None,
    log_every: int = 20,
    context_batch_size: int | None = None,
    target_batch_size: int | None = None,
    gradient: str = "exact",
    max_points: int | None = None,
    keep: str = "best",
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Learn prior, inference networks and noise from many tasks.

    Maximises the mean over tasks of the objective (a sum over the points of a task) with Adam and a learning rate that falls linearly;
    with `shrinkage` tau, mean over tasks - tau / T KL(p_Psi || N(0, I/p)) of T training tasks.

    Arguments:
        model: trained in place; its scaling is fitted on `tasks` if it was not fitted before.
        tasks: list of pairs (x, y) of any sizes, in the user's units; or triples (x, y, mask), True = observed, for each point or, with a
            model for `missing_outputs`, each output. Or a `bnnp.data.Collection`: one that is large is read while training goes on, and
            the scaling is then fitted on a sample of its tasks.
        validation: held-out tasks; a proportion of `tasks` to hold out; or None for no validation.
        objective: "pp_avi", "avi", "npml", "npvi" or "iw_avi".
        beta: weight in the objective, for those that have one.
        steps: number of steps.
        batch_size: tasks a step, all processed at once.
        num_samples: particles S.
        learning_rate: of the first step.
        final_learning_rate: of the last step.
        context: how much of a task goes into the context: a range of proportions (floats) or of counts (integers). At least one
            point is left on each side.
        prior_mean_from_step: step from which the prior's means are learned.
        prior_scale_from_step: step from which the prior's scales are learned.
        clip_norm: largest norm of the gradient; longer ones are shortened to it.
        per_point: divide each task's value by its number of points (and the penalty of `shrinkage` by the mean of these numbers).
        shrinkage: tau, how many nats of the evidence of all training tasks together one nat of the prior's divergence from the default
            N(0, I/p) costs; 0 lets the prior go wherever the tasks lead. Worth a trial where tasks are few; `bnnp.choose_prior` finds
            one. The default is N(0, I/p) whatever `scaled`, `spread` and `input_scale` make of the start. Validation scores know nothing
            of it.
        seed: of batches, splits and draws.
        folder: where log.jsonl and checkpoints (best model, last model, training state) go; nothing is written without it.
        checkpoint_every: steps between checkpoints; one is also written at the end and on Ctrl-C.
        validate_every: steps between validations; a twentieth of the run where not given.
        log_every: steps between records.
        context_batch_size: take contexts in batches of this many points, with memory that does not depend on their size.
        target_batch_size: the same for targets.
        gradient: where batches are taken, "exact", or "one_batch": an unbiased estimate that costs less. See `bnnp.objectives.avi`.
        max_points: of larger tasks, take this many points at random at each visit, another choice each time; `context` is then of these.
            For tasks such as fields and images, of which a step need not see every cell.
        keep: "best": leave the model at its best validation score; "last".
        resume: go on from the checkpoint in `folder`, if there is one; settings and tasks must be those of that run.
        progress: show a line of progress on standard error.

    Returns:
        A `TrainResult`.

    Raises:
        ValueError: tasks or settings that do not fit, or a checkpoint of another run.
        TrainingError: ten steps in a row were not finite.
    """
    check_count(checkpoint_every, "checkpoint_every")
    seeded(seed, "check")
    every = max(1, check_count(steps, "steps") // 20) if validate_every is None else validate_every
    settings = Settings(
        objective, beta, steps, batch_size, num_samples, learning_rate, final_learning_rate, context_range(context),
        prior_mean_from_step, prior_scale_from_step, clip_norm, per_point, operator.index(seed), every, log_every,
        context_batch_size, target_batch_size, gradient, shrinkage, max_points,
    )  # fmt: skip
    if keep not in ("best", "last"):
        raise ValueError(f"Expected keep as 'best' or 'last'. Got {keep!r}.")
    if resume and folder is None:
        raise ValueError("Expected folder= to resume from. Got none.")
    train, held_out = read_collections(model, tasks, validation, seed)
    check_contexts(train, held_out, settings)
    _check_model(model, settings)
    settings = dataclasses.replace(settings, data=digest_of(train, held_out))
    path = None if folder is None else Path(folder)
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
    checkpoint = _read(path, settings, model, len(train)) if resume and path is not None else None
    sample = looked_at(train)
    if not bool(model.scaling.fitted):
        model.fit_scaling(sample)
    model.reference.fit(sample, model.scaling.x)
    model.reference.note_context(settings.most_context(max(sizes_of(train))))
    run = _Run(model, train, held_out, settings, path, checkpoint_every, progress)
    if checkpoint is not None:
        run.resume(*checkpoint)
    return run.loop(keep)


def check_run(
    model: BNNP,
    tasks: Sequence[Any],
    validation: Sequence[Any] | None,
    *,
    objective: str,
    context: tuple[float, float] | tuple[int, int],
    max_points: int | None,
    shrinkage: float,
    seed: int,
) -> None:
    """Raise what `meta_train` would raise of these before its first step; the model is of no other use then."""
    settings = Settings(
        objective, 1.0, 1, 1, 1, 1.0, 1.0, context_range(context), 0, 0, None, False, seed, 1, 1, shrinkage=shrinkage, max_points=max_points
    )  # fmt: skip
    train, held_out = read_collections(model, tasks, validation, seed)
    check_contexts(train, held_out, settings)
    _check_model(model, settings)
    model.fit_scaling(looked_at(train))


def _check_model(model: BNNP, settings: Settings) -> None:
    if settings.objective == "iw_avi" and model.likelihood.conjugate and model.last_layer == "amortised":
        raise ValueError(
            "Expected last_layer='exact' with iw_avi, which integrates the last layer out and never asks its inference network. "
            "Got 'amortised'. Build the model with last_layer='exact'."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Expected a model with something to learn. Got one whose parameters are all frozen (requires_grad=False).")
    if settings.shrinkage > 0 and not any(p.requires_grad for p in (*model.prior.means(), *model.prior.scales())):
        raise ValueError(
            f"Expected a prior that is learned, to be shrunk. Got shrinkage={settings.shrinkage:g} and a prior that is held fixed. "
            "Leave shrinkage out, or let the prior learn (Prior(learn_mean=..., learn_scale=...), model.prior.learn())."
        )


def _described(settings: Settings, model: BNNP, num_tasks: int) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps({**asdict(settings), "num_tasks": num_tasks, "model": model.config}))
    return plain


def _comparable(described: dict[str, Any]) -> dict[str, Any]:
    return {**described, "model": comparable(described["model"])} if "model" in described else described


def _read(folder: Path, settings: Settings, model: BNNP, num_tasks: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Read the checkpoint of a run, or None where there is none; nothing is changed by a checkpoint that does not fit."""
    if not (folder / "state" / "training.json").exists():
        return None
    header, tensors = read_bundle(folder / "state", "training")
    here, there = (_comparable(one) for one in (_described(settings, model, num_tasks), header.get("settings", {})))
    earlier = {field.name: field.default for field in dataclasses.fields(Settings)}  # runs from before a setting was there
    other = sorted(key for key in here if here[key] != there.get(key, earlier.get(key)))
    if other:
        detail = "; ".join(f"{key} {there.get(key)!r} there and {here[key]!r} here" for key in other)
        raise ValueError(f"Expected the settings of the run in {folder}. Got others: {detail}. Use another folder for another run.")
    state: dict[str, Any] = header["state"]
    return state, tensors


class _Run:
    """Hold one run: the loop, its checkpoints and its log."""

    def __init__(
        self,
        model: BNNP,
        train: Sequence[Task],
        held_out: Sequence[Task],
        settings: Settings,
        folder: Path | None,
        checkpoint_every: int,
        progress: bool,
    ) -> None:
        self.model, self.train, self.settings, self.folder = model, train, settings, folder
        self.checkpoint_every, self.state = checkpoint_every, TrainState()
        self.learned = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.learned, lr=settings.learning_rate)
        self.data = seeded(settings.seed, "splits")
        self.noise = _on(_generator_device(model.device), settings.seed, "noise")
        # With values per point, the penalty counts against points: the same tau means the same.
        units = sum(min(n, settings.max_points or n) for n in sizes_of(train)) if settings.per_point else len(train)
        self.penalty = settings.shrinkage / units
        self.order: tuple[int, Tensor] | None = None
        self.mark: tuple[Tensor, Tensor] | None = None
        self.validation = self._validation(held_out)
        self.best = {key: value.clone() for key, value in model.state_dict().items()}
        self.bar = ProgressLine(settings.steps, progress)

    def _validation(self, held_out: Sequence[Task]) -> list[TaskBatch]:
        """Cut the held-out tasks once, so that scores of different steps compare."""
        generator = seeded(self.settings.seed, "validation")
        size = 50
        held_out = looked_at(held_out)
        return [self._cut(held_out[i : i + size], generator) for i in range(0, len(held_out), size)]

    def _cut(self, tasks: Sequence[Task], generator: torch.Generator) -> TaskBatch:
        if self.settings.max_points is not None:
            tasks = [_thinned(task, self.settings.max_points, generator) for task in tasks]
        counts = torch.tensor([len(task) for task in tasks])
        low, high = self.settings.context
        u = torch.rand(len(tasks), generator=generator, dtype=torch.float64)
        if isinstance(low, int):
            chosen = low + (u * (high - low + 1)).floor().long()
        else:
            chosen = ((low + u * (high - low)) * counts).round().long()
        batch = split(collate(tasks), torch.minimum(chosen.clamp(min=1), counts - 1), generator)
        return batch.to(self.model.device)

    def _batch(self, step: int) -> TaskBatch:
        """Return the step's tasks: each epoch visits every task once, in an order that depends on seed and epoch only."""
        picked = []
        for i in range(step * self.settings.batch_size, (step + 1) * self.settings.batch_size):
            epoch, at = divmod(i, len(self.train))
            if self.order is None or self.order[0] != epoch:
                generator = seeded(self.settings.seed, f"epoch {epoch}")
                self.order = (epoch, torch.randperm(len(self.train), generator=generator))
            picked.append(self.train[int(self.order[1][at])])
        whole = [task for task in picked if len(task) >= 2]  # of files that are read as we go, nobody knew how much was observed
        if not whole:
            raise TrainingError(f"Expected tasks with at least 2 observed points. Got none among the {len(picked)} tasks of step {step}.")
        return self._cut(whole, self.data)

    def _objective(self, batch: TaskBatch) -> Tensor:
        settings = self.settings
        value = OBJECTIVES[settings.objective](self.model, batch, settings.num_samples, self.noise, **settings.options)
        if self.settings.per_point:
            value = value / (batch.context.counts + batch.target.counts).to(value.device)
        return value.mean()

    def _step(self) -> tuple[float, float]:
        """Take one step; return the objective, without the penalty, and the gradient's norm, not finite where the step was left out."""
        step, settings = self.state.step, self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(step)
        prior = self.model.prior
        waiting = (prior.means() if step < settings.prior_mean_from_step else []) + (
            prior.scales() if step < settings.prior_scale_from_step else []
        )
        self.optimiser.zero_grad(set_to_none=True)
        try:
            value = self._objective(self._batch(step))
            loss = -value
            if self.penalty > 0:
                loss = loss + (self.penalty * prior.divergence()).to(value)
            loss.backward()
        except NotPositiveDefiniteError:
            self.mark = None
            return math.nan, math.nan
        for parameter in waiting:
            parameter.grad = None
        grads = [p.grad for p in self.learned if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        self.mark = None  # from here to the end of the step there is no state to go on from: the last checkpoint stands
        if bool(value.isfinite()) and bool(norm.isfinite()):
            if settings.clip_norm is not None and float(norm) > settings.clip_norm:
                for grad in grads:
                    grad.mul_(settings.clip_norm / norm)
            self.optimiser.step()
        return float(value.detach()), float(norm)

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Return the mean over held-out tasks of the log predictive density per target point."""
        if not self.validation:
            return None
        scores = []
        for i, batch in enumerate(self.validation):
            generator = _on(self.noise.device, self.settings.seed, f"validation {i}")
            try:
                value = OBJECTIVES["npml"](self.model, batch, max(16, self.settings.num_samples), generator, **self.settings.sizes)
            except NotPositiveDefiniteError:
                return math.nan
            scores.append(value.cpu() / batch.target.counts.cpu())
        return float(torch.cat(scores).mean())

    def loop(self, keep: str) -> TrainResult:
        """Run to the last step."""
        state, settings = self.state, self.settings
        try:
            while state.step < settings.steps:
                start = time.perf_counter()
                self.mark = (self.data.get_state(), self.noise.get_state())
                value, norm = self._step()
                self._count(value, norm)
                state.step += 1
                last = state.step == settings.steps
                score = self._validate() if last or state.step % settings.validate_every == 0 else None
                self._note_best(score)
                state.seconds += time.perf_counter() - start
                if last or score is not None or state.step % settings.log_every == 0:
                    self._record(value, norm, score)
                self.mark = (self.data.get_state(), self.noise.get_state())
                if self.folder is not None and (last or state.step % self.checkpoint_every == 0):
                    self.save()
        except KeyboardInterrupt:
            if self.folder is not None and self.mark is not None:
                self.data.set_state(self.mark[0])  # a step that was cut short is taken again
                self.noise.set_state(self.mark[1])
                self.save()
            raise
        finally:
            self.bar.close()
        scored = bool(self.validation) and math.isfinite(state.best_score)
        if self.validation and not scored:
            warnings.warn(
                "No validation score was finite: the model keeps the parameters of the last step.", NumericalWarning, stacklevel=3
            )
        if keep == "best" and scored:
            self.model.load_state_dict(self.best)
        best = state.best_score if scored else None
        unscored = keep == "last" or (bool(self.validation) and not scored)
        kept = state.step if unscored else state.best_step
        return TrainResult(state.history, kept, best, state.skipped, state.seconds)

    def _count(self, value: float, norm: float) -> None:
        state = self.state
        if math.isfinite(value) and math.isfinite(norm):
            state.bad_in_a_row = 0
            return
        state.skipped += 1
        state.bad_in_a_row += 1
        if state.bad_in_a_row >= MAX_BAD_STEPS:
            raise TrainingError(
                f"Expected a finite objective and gradient. Got {MAX_BAD_STEPS} steps in a row without, up to step {state.step} "
                f"(objective {value}, gradient norm {norm}). Lower learning_rate (now {self.settings.learning_rate:g}), bound the noise "
                "(Gaussian(max_noise_std=...)), clip the gradient (clip_norm), or look for extreme values in the data. "
                "The parameters are those of the last finite step."
            )

    def _note_best(self, score: float | None) -> None:
        state = self.state
        if not self.validation or (score is not None and score > state.best_score):
            state.best_step = state.step
            state.best_score = state.best_score if score is None else score
            if score is not None:
                self.best = {key: value.clone() for key, value in self.model.state_dict().items()}

    @torch.no_grad()
    def _divergence(self) -> float | None:
        """Return how far the prior is from the default, in nats; None where it has no finite value."""
        try:
            return _plain(float(self.model.prior.divergence()))
        except NotPositiveDefiniteError:
            return None

    def _record(self, value: float, norm: float, score: float | None) -> None:
        state = self.state
        noise = self.model.noise_std
        record = {
            "step": state.step,
            "objective": _plain(value),
            "validation": None if score is None else _plain(score),
            "gradient_norm": _plain(norm),
            "learning_rate": self.settings.rate(state.step - 1),
            "noise_std": None if noise is None else [_plain(float(s)) for s in noise],
            "divergence": self._divergence(),
            "skipped": state.skipped,
        }
        state.history.append(record)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "log.jsonl", "a" if len(state.history) > 1 else "w") as file:
                file.write(json.dumps({**record, "seconds": round(state.seconds, 3)}) + "\n")
        self.bar.show(state.step, f"objective {value:.3f}" + ("" if score is None else f"  validation {score:.3f}"))

    def save(self) -> None:
        """Write the training state, with the last and the best parameters, and the best model on its own."""
        assert self.folder is not None
        tensors = {f"last.{k}": v for k, v in self.model.state_dict().items()}
        best = self.best if self.validation else self.model.state_dict()
        tensors |= {f"best.{k}": v for k, v in best.items()}
        tensors |= {"generator.data": self.data.get_state(), "generator.noise": self.noise.get_state()}
        for i, parameter in enumerate(self.learned):
            tensors |= {f"adam.{i}.{k}": v for k, v in self.optimiser.state.get(parameter, {}).items()}
        state = asdict(self.state)
        state["best_score"] = _plain(self.state.best_score)
        write_bundle(
            self.folder / "state", "training", {"state": state, "settings": _described(self.settings, self.model, len(self.train))}, tensors
        )
        header = model_header(self.model)
        write_bundle(self.folder / "best", "model", header, best)
        write_bundle(self.folder / "last", "model", header, self.model.state_dict())

    def resume(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up a checkpoint."""
        self.model.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("last.")})
        self.best = {k[5:]: v.to(self.model.device) for k, v in tensors.items() if k.startswith("best.")}
        self.data.set_state(tensors["generator.data"])
        self.noise.set_state(tensors["generator.noise"])
        for i, parameter in enumerate(self.learned):
            mine = {k.rsplit(".", 1)[-1]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
            if mine:
                self.optimiser.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in mine.items()}
        state["best_score"] = -math.inf if state["best_score"] is None else state["best_score"]
        self.state = TrainState(**state)
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop what was logged after the checkpoint: those steps are taken again."""
        assert self.folder is not None
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.state.step]
        write_atomically(path, "".join(kept).encode())


def _thinned(task: Task, most: int, generator: torch.Generator) -> Task:
    """Return a random choice of a task's points, where it has more than `most`."""
    if len(task) <= most:
        return task
    at = torch.randperm(len(task), generator=generator)[:most]
    return Task(task.x[at], task.y[at], None if task.seen is None else task.seen[at])


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _on(device: torch.device, seed: int, stream: str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seeded(seed, stream).initial_seed())


def _generator_device(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")
