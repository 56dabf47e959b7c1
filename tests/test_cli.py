"""The command line: results on standard output, the rest on standard error, and an exit code that means something."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import bnnp
from bnnp import cli
from bnnp.demos.common import DemoResult, Table

runner = CliRunner()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the demos by one that notes how it was called."""
    noted: list[dict[str, Any]] = []

    def run(out: Path, **options: Any) -> DemoResult:
        noted.append({"out": out, **options})
        results = {"dataset": "digits", "ours": "us", "seconds": {"total": 12.0, "training": 9.0}, "reused_training": True}
        return DemoResult(
            out, results, (Table("Scores [nats]", ("method", "a"), (("us", "1.0 ± 0.1"),)),), ("A remark.",), ((out / "p.png", "it"),)
        )

    monkeypatch.setattr(cli, "DEMOS", {"digits": run, "sawtooth": run})
    return noted


def test_version() -> None:
    result = runner.invoke(cli.app, ["version"])
    assert result.exit_code == 0 and result.stdout.startswith(f"bnnp {bnnp.__version__} (torch ")


def test_demo_passes_its_options_on(calls: list[dict[str, Any]]) -> None:
    assert runner.invoke(cli.app, ["demo"]).exit_code == 0
    options = ["--dataset", "sawtooth", "--out", "there", "--steps", "7", "--seed", "3", "--fresh", "--quiet"]
    assert runner.invoke(cli.app, ["demo", *options]).exit_code == 0
    usual = {"out": Path("demo-output/digits"), "steps": cli.STEPS["digits"], "seed": 0, "progress": True, "fresh": False}
    assert calls == [usual, {"out": Path("there/sawtooth"), "steps": 7, "seed": 3, "progress": False, "fresh": True}]


def test_demo_prints_tables_remarks_and_where_the_files_are(calls: list[dict[str, Any]]) -> None:
    text = runner.invoke(cli.app, ["demo"]).stdout
    for part in (
        "Scores [nats]",
        "1.0 ± 0.1",
        "- A remark.",
        "demo-output/digits/p.png",
        "results.json",
        "Took 12 s",
        "training was done before",
    ):
        assert part in text


def test_json_is_all_that_is_printed(calls: list[dict[str, Any]]) -> None:
    assert json.loads(runner.invoke(cli.app, ["demo", "--json"]).stdout)["ours"] == "us"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "faces"], ["faces", "digits", "sawtooth"]),
        (["--steps", "0"], ["--steps"]),
        (["--steps", "many"], ["--steps", "integer"]),
        (["--sead", "1"], ["--sead"]),
    ],
)
def test_a_wrong_request_ends_with_2_and_says_what_was_expected(
    calls: list[dict[str, Any]], arguments: list[str], words: list[str]
) -> None:
    result = runner.invoke(cli.app, ["demo", *arguments])
    assert result.exit_code == 2 and result.stdout == "" and calls == []
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("Expected this. Got that."), 2, "Expected this. Got that."),
        (ImportError("The demo needs matplotlib."), 1, "The demo needs matplotlib."),
        (PermissionError("read-only"), 1, "read-only"),
        (KeyboardInterrupt(), 130, "goes on"),
    ],
)
def test_a_failure_is_one_line_and_an_exit_code(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str) -> None:
    def run(*_: Any, **__: Any) -> DemoResult:
        raise error

    monkeypatch.setattr(cli, "DEMOS", {"digits": run})
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == code and result.stdout == ""
    assert words in result.stderr and "Traceback" not in result.stderr


def test_a_real_demo_runs_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEMOS", {"sawtooth": partial(cli.DEMOS["sawtooth"], num_train=40, num_test=4)})
    result = runner.invoke(cli.app, ["demo", "--dataset", "sawtooth", "--steps", "2", "--out", str(tmp_path), "--json", "--quiet"])
    assert result.exit_code == 0 and result.stderr == ""
    assert json.loads(result.stdout) == json.loads((tmp_path / "sawtooth" / "results.json").read_text())


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    source = Path(bnnp.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(source)!r}); {code}"], capture_output=True, text=True
    )


def test_without_typer_the_command_says_what_to_install() -> None:
    result = python("sys.modules['typer'] = None; from bnnp.cli import main; main()")
    assert result.returncode == 1 and 'pip install "bnnp[cli]"' in result.stderr and "Traceback" not in result.stderr


def test_the_command_needs_no_other_extra_to_start() -> None:
    others = "matplotlib pandas pyarrow xarray netCDF4 zarr wfdb PIL sklearn scipy starlette uvicorn arviz polars".split()
    blocked = f"[sys.modules.__setitem__(name, None) for name in {others}]"
    result = python(f"{blocked}; sys.argv = ['bnnp', 'version', '--json']; from bnnp.cli import main; main()")
    assert result.returncode == 0 and json.loads(result.stdout)["bnnp"] == bnnp.__version__, result.stderr


def test_python_m_bnnp_is_the_command() -> None:
    result = python("import runpy; sys.argv = ['bnnp', 'version']; runpy.run_module('bnnp', run_name='__main__')")
    assert result.returncode == 0 and result.stdout.startswith("bnnp ")
