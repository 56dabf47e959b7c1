"""The command line: every verb is a thin wrapper around a function that can be imported.

Results go to standard output, progress to standard error. Exit codes: 0 done, 1 something failed (a full disk, a missing package), 2 a
wrong request (data, settings, a path), 70 a fault of this program, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import io
import platform
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch

from bnnp import __version__
from bnnp.demos import digits, sawtooth
from bnnp.demos.common import DemoResult

try:
    import typer
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from bnnp.commands import register
    from bnnp.console import expanded, give, told
except ImportError as missing:  # this module is only ever imported to run the command
    sys.exit(f'The command line needs typer and rich ({missing}). Run: pip install "bnnp[cli]".')

__all__ = ["app", "demo", "main", "version"]

DEMOS = {"digits": digits.run, "sawtooth": sawtooth.run}
STEPS = {"digits": digits.STEPS, "sawtooth": sawtooth.STEPS}
USUAL_STEPS = ", ".join(f"{name}: {steps}" for name, steps in STEPS.items())
NARROWEST = 100  # columns of text in a file or pipe, and at least in a terminal: a cut number is worse than a wrapped line

app = typer.Typer(
    help="Learn a prior over neural-network weights from many related data sets; get the posterior of a new one in one pass.",
    epilog="Exit codes: 0 done, 1 something failed, 2 a wrong request, 70 a fault of this program, 130 stopped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Dataset(StrEnum):
    """Name the data of a demo."""

    digits = "digits"
    sawtooth = "sawtooth"


@app.command()
def version(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """Print the versions that a report of a problem needs."""
    found = {"bnnp": __version__, "torch": torch.__version__, "python": platform.python_version()}
    give(as_json, found, lambda: typer.echo("bnnp {bnnp} (torch {torch}, python {python})".format(**found)))


@app.command()
def demo(
    dataset: Annotated[
        Dataset, typer.Option(help="digits: complete handwritten digits from a few pixels. sawtooth: functions of one input.")
    ] = Dataset.digits,
    out: Annotated[
        Path, typer.Option(help="Folder for results, pictures and training runs; each dataset has its own folder inside.")
    ] = Path("demo-output"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; fewer are faster and worse.", show_default=USUAL_STEPS)] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, batches and draws.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away an earlier run with the same folder, steps and seed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")] = False,
) -> None:
    """Learn a prior from many data sets, predict new ones, and compare with rivals, in minutes.

    Stopped with Ctrl-C, the same command goes on where it was. A finished run is used again.
    """
    # Two threads on many small factorisations are slower than one, and a second process trains the rival.
    torch.set_num_threads(1)
    with told(as_json, "Stopped. The same command goes on from the last checkpoint."):
        folder = out / dataset.value
        result = DEMOS[dataset.value](folder, steps=steps or STEPS[dataset.value], seed=seed, progress=not quiet, fresh=fresh)
        give(as_json, result.results, lambda: show(result))


def show(result: DemoResult) -> None:
    """Print tables, remarks and the places of all files."""
    console = Console(highlight=False, width=max(Console().width, NARROWEST))
    for table in result.tables:
        drawn = Table(title=escape(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for name, *cells in zip(table.header, *table.rows, strict=True):
            words = any(cell[:1].isalpha() for cell in cells)
            drawn.add_column(escape(name), justify="left" if words else "right", no_wrap=True)
        grouped = any(row[0] == "" for row in table.rows)
        for row in table.rows:
            if grouped and row[0]:
                drawn.add_section()
            drawn.add_row(*map(escape, row), style="bold" if result.results["ours"] in row[:2] else None)
        console.print(drawn)
        console.print()
    for remark in result.remarks:
        console.print(f"- {remark}", markup=False)
    console.print("\nPictures", style="bold")
    for path, what in result.pictures:
        console.print(f"  {path}  {what}", markup=False, soft_wrap=True)
    seconds = result.results["seconds"]
    again = " (training was done before)" if result.results["reused_training"] else ""
    console.print(f"\nNumbers: {result.out / 'results.json'}, {result.out / 'results.md'}", markup=False, soft_wrap=True)
    console.print(f'The trained model: bnnp.load("{result.out / "model"}")', markup=False, soft_wrap=True)
    console.print(f"Took {seconds['total']:.0f} s, of which training {seconds['training']:.0f} s{again}.", markup=False)


register(app)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows no "±" gets another sign, and not an error
            stream.reconfigure(errors="backslashreplace")
    app(args=expanded(sys.argv[1:]))


if __name__ == "__main__":
    main()
