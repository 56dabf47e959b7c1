"""Pictures of what was learned and what is predicted, for readers who have not seen the code.

Every function takes arrays, knows no model, and returns a matplotlib `Figure` made without pyplot: no global state is
changed, and the colours and sizes that matter are set here. Colours are those of Okabe and Ito, which readers with any
colour vision can tell apart. `save_figure` writes the file whole or not at all.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = [
    "Panel",
    "calibration",
    "choice",
    "coherent_completions",
    "completions",
    "dress",
    "functions_1d",
    "learning_curve",
    "prior_images",
    "rank_ecdf",
    "save_figure",
    "scores_bar",
]

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
INK, GRID = "#222222", "#DDDDDD"
UNSEEN = "#BFDDF2"  # no grey value looks like this
TITLE, LABEL, TICK = 13, 11, 10
DPI = 130
HOW_TO_READ_RANKS = (
    "How to read a line outside the band: mostly above 0, draws are too high; mostly below 0, too low;\n"
    "first above and then below, too narrow (too sure); first below and then above, too wide."
)
MOST_SAMPLES = 30  # more lines than this hide one another

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class Panel(TypedDict):
    """Hold what one panel of `functions_1d` shows; M points along x, n sampled functions.

    Arguments:
        title: plain words above the panel.
        x: inputs with shape (M,), increasing.
        samples: sampled functions with shape (n, M).
        xc, yc: the points that the model saw, both with shape (N,).
        mean: predictive mean with shape (M,).
        lower, upper: edges of the predictive interval, both with shape (M,).
        truth: the function that made the data, with shape (M,).
    """

    title: str
    x: ArrayLike
    samples: NotRequired[ArrayLike]
    xc: NotRequired[ArrayLike]
    yc: NotRequired[ArrayLike]
    mean: NotRequired[ArrayLike]
    lower: NotRequired[ArrayLike]
    upper: NotRequired[ArrayLike]
    truth: NotRequired[ArrayLike]


def save_figure(fig: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Write a figure to a file that is either complete or, after a failure, as it was before.

    Arguments:
        fig: the figure.
        path: the file; its ending chooses the format. Missing folders are made.
        dpi: pixels per inch.

    Returns:
        The path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, for a rename across file systems is a copy; with the same ending, for that names the format.
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex}{target.suffix}")
    try:
        fig.savefig(temporary, dpi=dpi, facecolor="white")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def learning_curve(
    records: Sequence[Mapping[str, Any]],
    objective: str = "objective",
    validation: str = "validation",
    title: str = "Learning the prior from many data sets",
    label: str = "objective per data set (higher is better)",
) -> Figure:
    """Draw the training objective and the validation score against the training step.

    Arguments:
        records: dictionaries with "step" and, where measured, the two values below; None and NaN are left out.
        objective: key of the training objective.
        validation: key of the score on held-out data sets.
        title: above the plot.
        label: of the vertical axis.

    Returns:
        The figure.
    """
    fig = _figure(7.0, 4.2)
    ax = fig.add_subplot()
    steps, train = _series(records, objective)
    if len(steps):
        ax.plot(steps, train, color=BLUE, alpha=0.3, linewidth=0.8)
        ax.plot(steps, _running_mean(train), color=BLUE, linewidth=2.0, label="training batches (running mean)")
    steps, held_out = _series(records, validation)
    if len(steps):
        ax.plot(steps, held_out, "o-", color=RED, markersize=4, linewidth=1.6, label="data sets held out")
        best = int(np.argmax(held_out))
        name = f"best held out, step {steps[best]:.0f}"
        ax.plot(steps[best], held_out[best], "*", color=RED, markersize=15, label=name)
    values = np.concatenate([_running_mean(train), held_out])
    if len(values) > 20:
        # The first steps are often so poor that the rest would be drawn as a flat line.
        low, high = float(np.quantile(values, 0.03)), float(values.max())
        pad = 0.12 * (high - low) or 1.0
        ax.set_ylim(low - pad, high + pad)
    dress(ax, title, "training step", label)
    handles, names = ax.get_legend_handles_labels()
    if handles:
        ax.legend(handles, names, loc="lower right", fontsize=TICK, facecolor="white", edgecolor=GRID, labelcolor=INK)
    return fig


def functions_1d(
    panels: Sequence[Panel], columns: int = 3, xlabel: str = "input x", ylabel: str = "output y", interval: str = "95 %"
) -> Figure:
    """Draw functions of one input, one panel beside the other, with a common legend.

    Arguments:
        panels: what to draw; see `Panel`.
        columns: panels in a row.
        xlabel: of all horizontal axes.
        ylabel: of all vertical axes.
        interval: name of the band between `lower` and `upper`.

    Returns:
        The figure.
    """
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig = _figure(4.2 * columns, 3.3 * rows + 0.5)
    entries: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        ax = fig.add_subplot(rows, columns, i + 1)
        _draw_panel(ax, panel, interval)
        dress(ax, panel["title"], xlabel if i + columns >= len(panels) else "", ylabel if i % columns == 0 else "")
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(name, handle)
    if entries:
        _legend_below(fig, list(entries.values()), list(entries), columns=5 if columns > 1 else 2)
    return fig


def prior_images(before: ArrayLike, after: ArrayLike, real: ArrayLike, title: str = "Images drawn from the prior, and real ones") -> Figure:
    """Draw images from the prior before and after learning above real images, all on one grey scale from 0 to 1.

    Arguments:
        before: images from the prior at the start with shape (n, height, width).
        after: images from the learned prior with shape (n, height, width).
        real: real images with shape (n, height, width).
        title: above the picture.

    Returns:
        The figure.
    """
    named = [("prior before\nlearning", before), ("prior after\nlearning", after), ("real images", real)]
    count = max(len(np.asarray(images)) for _, images in named)
    fig = _figure(1.05 * count + 1.6, 4.0)
    axes = fig.subplots(3, count, squeeze=False)
    for row, (name, images) in zip(axes, named, strict=True):
        for ax, image in zip(row, _float(images), strict=False):
            _show_grey(ax, image)
        for ax in row[len(np.asarray(images)) :]:
            ax.set_axis_off()
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=LABEL, color=INK)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def completions(
    truth: ArrayLike,
    observed: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    title: str = "Completing images from a few seen pixels",
    row_labels: Sequence[str] | None = None,
) -> Figure:
    """Draw one row per image: the true one, what the model sees, what it predicts, and how unsure it is.

    Arguments:
        truth: images with shape (n, height, width).
        observed: True where a pixel is seen, with shape (n, height, width).
        mean: predictive mean with shape (n, height, width).
        std: predictive standard deviation in grey value with shape (n, height, width).
        title: above the picture.
        row_labels: n names for the rows, such as "10 % seen".

    Returns:
        The figure.
    """
    images, seen, means, stds = _float(truth), np.asarray(observed, dtype=bool), _float(mean), _float(std)
    fig = _figure(7.1 if row_labels else 6.3, 1.45 * len(images) + 1.7)
    axes = fig.subplots(len(images), 4, squeeze=False)
    top = float(stds.max()) or 1.0
    for i, row in enumerate(axes):
        grey = _show_grey(row[0], images[i])
        _show_seen(row[1], images[i], seen[i])
        _show_grey(row[2], means[i])
        unsure = row[3].imshow(stds[i], cmap="YlOrRd", vmin=0.0, vmax=top, interpolation="nearest")
        _bare(row[3])
        if row_labels:
            row[0].set_ylabel(row_labels[i], rotation=0, ha="right", va="center", fontsize=LABEL, color=INK)
    names = ("true image", "what the\nmodel sees", "predicted\nmean", "how unsure\nit is")
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=LABEL, color=INK)
    _colorbar(fig, grey, axes[:, 0:3], "grey value (0 paper, 1 ink)")
    _colorbar(fig, unsure, axes[:, 3:], "standard deviation\n(grey value)")
    _unseen_legend(fig)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def coherent_completions(
    truth: ArrayLike,
    observed: ArrayLike,
    samples: ArrayLike,
    title: str = "Several whole images that agree with the seen pixels",
) -> Figure:
    """Draw the true image, what the model sees, and several completions, each drawn for all pixels together.

    Arguments:
        truth: one image with shape (height, width), or m of them with shape (m, height, width): one row each.
        observed: True where a pixel is seen, with the shape of `truth`.
        samples: n completions with shape (n, height, width), or (n, m, height, width).
        title: above the picture.

    Returns:
        The figure.
    """
    images, seen, drawn = _float(truth), np.asarray(observed, dtype=bool), _float(samples)
    if images.ndim == 2:
        images, seen, drawn = images[None], seen[None], drawn[:, None]
    n, m = drawn.shape[:2]
    fig = _figure(1.2 * (n + 2) + 0.6, 1.25 * m + 1.0)
    axes = fig.subplots(m, n + 2, squeeze=False)
    for i, row in enumerate(axes):
        _show_grey(row[0], images[i])
        _show_seen(row[1], images[i], seen[i])
        for j in range(n):
            _show_grey(row[2 + j], drawn[j, i])
    names = ["true image", "what the\nmodel sees", *(f"guess {j + 1}" for j in range(n))]
    for ax, name in zip(axes[0], names, strict=True):
        ax.set_title(name, fontsize=LABEL, color=INK)
    _unseen_legend(fig)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def calibration(
    pit: Mapping[str, ArrayLike],
    levels: Sequence[float] = (0.5, 0.8, 0.95),
    independent: int | None = None,
    title: str = "Are the stated probabilities right?",
) -> Figure:
    """Draw how often the truth lies where each method says it should: quantiles at the left, intervals at the right.

    The band holds the whole line of a calibrated method with probability 95 %: half-width sqrt(log(2 / 0.05) / (2 n)).

    Arguments:
        pit: for each method, the predictive probabilities of a value below the true one, pooled, with shape (K,).
        levels: of the central intervals whose coverage is counted.
        independent: number n of independent values for the band. Pixels of one image are not independent: give the
            number of images. None draws no band.
        title: above the picture.

    Returns:
        The figure.

    References:
        The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality, Massart, 1990.
    """
    fig = _figure(10.0, 5.2)
    left, right = fig.subplots(1, 2)
    nominal = np.linspace(0.0, 1.0, 201)
    if independent:
        half = math.sqrt(math.log(2.0 / 0.05) / (2.0 * independent))
        edges = np.clip(nominal - half, 0.0, 1.0), np.clip(nominal + half, 0.0, 1.0)
        left.fill_between(nominal, *edges, color=GRID, label="calibrated, 95 % band", linewidth=0)
    left.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1.2, label="perfect")
    width = 0.8 / max(len(pit), 1)
    for i, (name, values) in enumerate(pit.items()):
        colour, ranks = CYCLE[i % len(CYCLE)], np.sort(_float(values).ravel())
        below = np.searchsorted(ranks, nominal, side="right") / len(ranks)
        left.plot(nominal, below, color=colour, linewidth=2.0, label=name)
        share = [float(np.mean(np.abs(ranks - 0.5) <= 0.5 * level)) for level in levels]
        places = np.arange(len(levels)) + (i - 0.5 * (len(pit) - 1)) * width
        right.bar(places, share, width=0.92 * width, color=colour)
        for place, s in zip(places, share, strict=True):
            # At the foot of the bar: at its top the dashed line would run through the number.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            right.text(place, 0.03, f"{100 * s:.0f}", ha="center", fontsize=TICK - 1, color=INK, bbox=box)
    for j, level in enumerate(levels):
        right.plot([j - 0.45, j + 0.45], [level, level], color=INK, linestyle="--", linewidth=1.4)
    right.set_xticks(range(len(levels)), [f"{100 * level:g} % interval" for level in levels])
    right.set_ylim(0.0, 1.02)
    left.set_aspect("equal")
    dress(left, "All quantiles", "predicted probability of a lower value", "share of true values below")
    dress(right, "Central intervals (dashed: stated level)", "", "share of true values inside")
    right.grid(False, axis="x")
    handles, names = left.get_legend_handles_labels()
    _legend_below(fig, handles, names, columns=4)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def rank_ecdf(
    ranks: Mapping[str, ArrayLike],
    num_ranks: int,
    bands: tuple[ArrayLike, ArrayLike],
    p_values: Mapping[str, float],
    title: str = "Where do true values rank among draws from the posterior?",
) -> Figure:
    """Draw for each quantity how far the share of ranks <= i lies above the (i + 1) / (D + 1) of uniform ranks, in a panel of its own.

    Arguments:
        ranks: for each quantity, how many of the D draws lie below the true value, with shape (R,).
        num_ranks: number D of draws.
        bands: smallest and largest share of ranks <= i expected of R uniform ranks, each with shape (D + 1,).
        p_values: for each quantity, of its ranks being uniform.
        title: above the picture.

    Returns:
        The figure; where a line is outside the band, it is drawn in another colour.

    Raises:
        ValueError: there are no ranks.

    References:
        Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample comparison
        (Säilynoja, Bürkner and Vehtari, 2022).
    """
    if not ranks:
        raise ValueError("Expected ranks of at least one quantity. Got none.")
    rows = math.ceil(len(ranks) / 4)
    columns = math.ceil(len(ranks) / rows)
    fig = _figure(max(2.9 * columns, 8.2), 2.5 * rows + 2.2)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    # A share of ranks <= i is drawn above the share that uniform ranks have, the line starting at (0, 0).
    uniform = np.arange(num_ranks + 2) / (num_ranks + 1)
    lower, upper = (np.concatenate([[0.0], _float(edge)]) - uniform for edge in bands)
    for i, (ax, (name, values)) in enumerate(zip(axes, ranks.items(), strict=False)):
        counts = np.bincount(np.asarray(values, dtype=np.int64), minlength=num_ranks + 1)
        line = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()]) - uniform
        outside = np.where((line < lower - 1e-9) | (line > upper + 1e-9), line, np.nan)
        ax.fill_between(uniform, lower, upper, color=GRID, linewidth=0, label="a right posterior stays in here 95 times in 100")
        ax.axhline(0.0, color=INK, linestyle="--", linewidth=1.0)
        ax.plot(uniform, line, color=BLUE, linewidth=2.0, label="observed")
        ax.plot(uniform, outside, ".-", color=RED, linewidth=2.5, markersize=5, label="observed, outside")
        p = p_values[name]
        says = f"p = {p:.2f}" if p >= 0.01 else f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"
        xlabel = "rank of the true value\n(0: below all draws, 1: above)" if i + columns >= len(ranks) else ""
        dress(ax, f"{name}\n{says}", xlabel, "share ranked no higher,\nless the expected share" if i % columns == 0 else "")
        ax.tick_params(labelbottom=True)
        ax.grid(False)
    for ax in axes[len(ranks) :]:
        ax.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    _legend_below(fig, handles, names, columns=3, title=HOW_TO_READ_RANKS)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def scores_bar(
    table: Mapping[str, Mapping[str, tuple[float, float]]],
    label: str = "log-density per unseen pixel (higher is better)",
    title: str = "How well are the unseen pixels predicted?",
    zero: str | None = None,
) -> Figure:
    """Draw one group of bars per condition and one bar per method, with the standard error as a whisker.

    Arguments:
        table: method -> condition -> (mean, standard error), such as table["pixel normal"]["10 % seen"].
        label: of the vertical axis.
        title: above the plot.
        zero: what the value 0 stands for; None says nothing.

    Returns:
        The figure.
    """
    conditions = list(dict.fromkeys(name for scores in table.values() for name in scores))
    fig = _figure(max(6.5, 0.75 * len(table) * len(conditions) + 1.5), 4.8)
    ax = fig.add_subplot()
    width = 0.84 / max(len(table), 1)
    for i, (method, scores) in enumerate(table.items()):
        known = [j for j, name in enumerate(conditions) if name in scores]
        means = [scores[conditions[j]][0] for j in known]
        places = np.array(known) + (i - 0.5 * (len(table) - 1)) * width
        errors = [scores[conditions[j]][1] for j in known]
        colour = CYCLE[i % len(CYCLE)]
        bars = ax.bar(places, means, 0.92 * width, yerr=errors, color=colour, label=method, ecolor=INK, capsize=3)
        ax.bar_label(bars, labels=[_signed(m) for m in means], fontsize=TICK - 1, color=INK, padding=4)
    ax.axhline(0.0, color=INK, linewidth=1.0)
    ax.margins(y=0.12)
    ax.set_xticks(range(len(conditions)), conditions)
    dress(ax, title, zero or "", label)
    ax.grid(False, axis="x")
    handles, names = ax.get_legend_handles_labels()
    _legend_below(fig, handles, names, columns=4)
    return fig


def choice(rows: Sequence[Mapping[str, Any]], title: str = "How much of the prior should be learned?") -> Figure:
    """Draw the score of each fraction that is learned and of each shrinkage, the chosen one with a star.

    Bars are standard errors of the difference to the chosen one, task by task. At the ends of the shrinkages stand the prior that is all
    learned and the fixed one. A score far below the others is drawn at the lower edge, with its value.

    Arguments:
        rows: of a `bnnp.Choice`.

    Returns:
        The figure.

    Raises:
        ValueError: there is no score.
    """
    scored = [row for row in rows if row["failed"] is None and math.isfinite(row["score"])]
    if not scored:
        raise ValueError("Expected at least one candidate with a score. Got none.")
    values = np.array([row["score"] for row in scored])
    top, reach = float(values.max()), float(values.max() - np.median(values)) or 1.0
    floor = max(float(values.min()), top - 3.0 * reach) - 0.25 * reach
    fig = _figure(9.5, 4.6)
    left, right = fig.subplots(1, 2, sharey=True)
    plain = sorted((row for row in scored if row["shrinkage"] == 0), key=lambda row: row["fraction"])
    shrunk = sorted((row for row in scored if row["shrinkage"] > 0), key=lambda row: row["shrinkage"])
    _scores_along(left, [row["fraction"] for row in plain], plain, floor)
    left.set_xlim(-0.08, 1.08)
    places = [math.log10(row["shrinkage"]) for row in shrunk]
    step = (places[-1] - places[0]) / (len(places) - 1) if len(places) > 1 else 1.0
    ticks = [(place, f"{row['shrinkage']:g}") for place, row in zip(places, shrunk, strict=True)]
    along = list(zip(places, shrunk, strict=True))
    for row in plain if shrunk else []:
        if row["fraction"] in (0.0, 1.0):
            place, word = (places[0] - step, "0\n(all learned)") if row["fraction"] == 1 else (places[-1] + step, "\N{INFINITY}\n(fixed)")
            along, ticks = [*along, (place, row)], [*ticks, (place, word)]
    along.sort(key=lambda pair: pair[0])
    _scores_along(right, [place for place, _ in along], [row for _, row in along], floor)
    right.set_xticks([place for place, _ in ticks], [word for _, word in ticks])
    low = min([floor, *(row["score"] - row["behind_se"] for row in scored if row["score"] >= floor and math.isfinite(row["behind_se"]))])
    left.set_ylim(low - 0.1 * (top - low), top + 0.15 * (top - low))
    dress(left, "learned in part", "fraction of the weights whose prior is learned", "log density per target point\n(higher is better)")
    dress(right, "all learned, and shrunk", "shrinkage, nats for each nat of divergence", "")
    entries: dict[str, Any] = {}
    for ax in (left, right):
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    _legend_below(fig, list(entries.values()), list(entries), columns=3)
    fig.suptitle(title, fontsize=TITLE, color=INK)
    return fig


def _scores_along(ax: Axes, places: Sequence[float], rows: Sequence[Mapping[str, Any]], floor: float) -> None:
    """Draw scores with their errors at some places; those below the floor at the floor."""
    scores = np.array([row["score"] for row in rows])
    inside = scores >= floor
    x, errors = np.array(places), np.nan_to_num([row["behind_se"] for row in rows])
    ax.plot(x, np.maximum(scores, floor), color=BLUE, linewidth=1.2, alpha=0.5)
    bars: dict[str, Any] = {"color": BLUE, "ecolor": INK, "capsize": 3, "markersize": 6}
    if inside.any():
        ax.errorbar(x[inside], scores[inside], errors[inside], fmt="o", **bars, label="held-out tasks (bars: error of the difference)")
    for place, score in zip(x[~inside], scores[~inside], strict=True):
        ax.plot(place, floor, "v", color=BLUE, markersize=8, label="far below")
        ax.annotate(_signed(score), (place, floor), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=TICK, color=INK)
    for place, row in zip(places, rows, strict=True):
        if row["chosen"]:
            ax.plot(place, row["score"], "*", color=RED, markersize=17, zorder=5, label="chosen")


def _draw_panel(ax: Axes, panel: Panel, interval: str) -> None:
    """Draw what a panel holds, from the broad to the fine: band, samples, truth, mean, points."""
    x = _float(panel["x"])
    if "lower" in panel and "upper" in panel:
        lower, upper = _float(panel["lower"]), _float(panel["upper"])
        ax.fill_between(x, lower, upper, color=BLUE, alpha=0.18, linewidth=0, label=f"{interval} interval")
    if "samples" in panel:
        drawn = _float(panel["samples"])[:MOST_SAMPLES]
        lines = ax.plot(x, drawn.T, color=SKY, alpha=max(0.35, 0.9 - 0.02 * len(drawn)), linewidth=1.0)
        lines[0].set_label("sampled functions")
    if "truth" in panel:
        ax.plot(x, _float(panel["truth"]), color=INK, linestyle="--", linewidth=1.4, label="truth")
    if "mean" in panel:
        ax.plot(x, _float(panel["mean"]), color=BLUE, linewidth=2.0, label="predicted mean")
    if "xc" in panel and "yc" in panel:
        xc, yc = _float(panel["xc"]), _float(panel["yc"])
        ax.plot(xc, yc, "o", color=RED, markersize=5, markeredgecolor="white", label="points seen", zorder=5)


def _show_grey(ax: Axes, image: FloatArray) -> ScalarMappable:
    """Draw an image with ink dark on paper white."""
    shown = ax.imshow(image, cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
    _bare(ax)
    return shown


def _show_seen(ax: Axes, image: FloatArray, seen: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    """Draw the seen pixels of an image; the background shows where nothing was seen."""
    _show_grey(ax, np.where(seen, image, np.nan))
    ax.set_facecolor(UNSEEN)


def _bare(ax: Axes) -> None:
    """Remove ticks and draw a thin frame, without which white paper has no edge."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color="#999999", linewidth=0.6)


def _colorbar(fig: Figure, shown: ScalarMappable, axes: Any, label: str) -> None:
    """Put a colour bar with units below some columns."""
    aspect = 30 if axes.shape[1] > 1 else 10
    bar = fig.colorbar(shown, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=aspect)
    bar.set_label(label, fontsize=TICK, color=INK)
    bar.ax.tick_params(labelsize=TICK - 1, colors=INK)
    bar.outline.set_visible(False)


def _unseen_legend(fig: Figure) -> None:
    """Say below the picture what the flat colour means."""
    from matplotlib.patches import Patch

    patch = Patch(facecolor=UNSEEN, edgecolor="#999999")
    _legend_below(fig, [patch], ["pixel that the model does not see"], columns=1)


def _legend_below(fig: Figure, handles: Sequence[Any], names: Sequence[str], columns: int, title: str | None = None) -> None:
    """Name what was drawn, below all panels; a title stands above the names."""
    ncols = min(columns, len(names))
    legend = fig.legend(
        list(handles),
        list(names),
        loc="outside lower center",
        ncols=ncols,
        fontsize=TICK,
        frameon=False,
        labelcolor=INK,
        title=title,
        title_fontsize=LABEL,
    )
    legend.get_title().set(color=INK, multialignment="center")


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure that belongs to no window and no global list."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Drawing needs matplotlib. Run: pip install "bnnp[plot]".') from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def dress(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Give an axis its words, sizes and a light grid."""
    ax.set_facecolor("white")
    ax.set_title(title, fontsize=TITLE - 1, color=INK)
    ax.set_xlabel(xlabel, fontsize=LABEL, color=INK)
    ax.set_ylabel(ylabel, fontsize=LABEL, color=INK)
    ax.tick_params(labelsize=TICK, colors=INK)
    ax.grid(True, color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=INK)


def _signed(value: float) -> str:
    """Return two decimals with the minus sign that the axis uses."""
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[FloatArray, FloatArray]:
    """Return steps and finite values of one key."""
    pairs = [(float(r["step"]), float(r[key])) for r in records if r.get(key) is not None]
    pairs = [pair for pair in pairs if math.isfinite(pair[1])]
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _running_mean(values: FloatArray) -> FloatArray:
    """Return the mean over a window of a fiftieth of the run around each value, cut off at the ends of the run."""
    reach = len(values) // 100
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    starts, ends = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    means: FloatArray = (total[ends] - total[starts]) / (ends - starts)
    return means


def _float(values: ArrayLike) -> FloatArray:
    """Return an array of float64; a torch tensor on the CPU without gradient is an array too."""
    return np.asarray(values, dtype=np.float64)
