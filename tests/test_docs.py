"""The pages tell the truth: every Python block runs, and every command of ours; what they are said to print is what they print.

The blocks of one page share a namespace and run in order in an empty folder. Console blocks of docs/ run where each of their commands is
one of `bnnp`; a `fit` that says nothing of its steps takes three. A block that cannot run says why, in a comment on a line of its own
above it: `<!-- not run: needs a GPU -->`. A block of text that is said to be printed, `<!-- printed -->` above it, is looked for in what
the blocks before it printed. Links lead somewhere, the site has a place for every page and every public name, and it needs nothing from
outside.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE_PAGES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md") if "_build" not in p.parts)
PAGES = ["README.md", "CONTRIBUTING.md", *SITE_PAGES]

FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,}) *(?P<language>[\w+{}-]*)")
SKIP = re.compile(r"^\s*<!-- not run: \S.*-->\s*$")
PRINTED = re.compile(r"^\s*<!-- printed -->\s*$")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=\"([^\"]+)\"|^\s*\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """Hold one fenced block: its language, the line its code starts on, the code, and whether it is to be run or was printed."""

    language: str
    line: int
    code: str
    run: bool
    printed: bool = False

    @property
    def commands(self) -> list[list[str]]:
        """Return the arguments of the commands of a console block, where all are ours."""
        lines = [line for line in re.sub(r"\\\n\s*", " ", self.code).splitlines() if line.strip()]
        ours = self.language == "console" and all(line.startswith("bnnp ") for line in lines)
        return [shlex.split(line, comments=True)[1:] for line in lines] if ours else []


def read(text: str) -> tuple[list[Block], str]:
    """Return the fenced blocks of a page, and the page without them."""
    blocks: list[Block] = []
    prose: list[str] = []
    opening: re.Match[str] | None = None
    start = 0
    rows = text.splitlines()
    for number, row in enumerate(rows, start=1):
        if opening is None:
            opening, start = FENCE.match(row), number + 1
            if opening is None:
                prose.append(row)
        elif row.strip().startswith(opening["marks"]) and not row.strip().strip(opening["marks"][0]):
            code = "\n".join(r.removeprefix(opening["indent"]) for r in rows[start - 1 : number - 1])
            above = next((r for r in reversed(prose) if r.strip()), "")
            blocks.append(Block(opening["language"], start, code, not SKIP.match(above), bool(PRINTED.match(above))))
            # A comment speaks of one block only.
            prose.append("(block)")
            opening = None
    assert opening is None, f"the block that starts at line {start} has no end"
    return blocks, "\n".join(prose)


def run(blocks: list[Block], name: str) -> dict[str, object]:
    """Run the blocks in one namespace; a traceback names the page and its line."""
    namespace: dict[str, object] = {"__name__": "page"}
    said = io.StringIO()
    for block in blocks:
        with contextlib.redirect_stdout(said):
            if block.language == "python" and block.run:
                exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
            for command in block.commands if block.run else []:
                print(answer(command, f"{name}:{block.line}"))
        if block.printed:
            assert plain(block.code) in plain(said.getvalue()), f"{name}:{block.line} is not what was printed:\n{said.getvalue()}"
    return namespace


def plain(text: str) -> str:
    """Return text without what a terminal's width changes."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def answer(command: list[str], where: str) -> str:
    """Run one of our commands in this process; return what it prints."""
    cli, testing, console = (importlib.import_module(part) for part in ("bnnp.cli", "typer.testing", "bnnp.console"))
    quick = ["--steps", "3"] if command[0] == "fit" and "--steps" not in command and "--plan" not in command else []
    result = testing.CliRunner().invoke(cli.app, console.expanded([*command, *quick]))
    assert result.exit_code == 0, f"{where}: bnnp {shlex.join(command)} ended with {result.exit_code}:\n{result.output}"
    return str(result.stdout)


def broken_links(prose: str, folder: Path) -> list[str]:
    """Return the relative links that lead nowhere."""
    prose = re.sub(r"`[^`\n]*`", "", prose)
    targets = ["".join(match) for match in LINK.findall(prose)]
    relative = [t for t in targets if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", t)]
    return [t for t in relative if not (folder / t.split("#")[0]).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, _ = read((ROOT / page).read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    # The files that the README's commands are about are the reader's.
    run(blocks if page.startswith("docs/") else [block for block in blocks if block.language != "console"], page)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_have_the_options_that_are_shown(page: str) -> None:
    blocks, prose = read((ROOT / page).read_text("utf-8"))
    shown = [line for block in blocks if block.language == "console" for line in block.code.splitlines()]
    assert unknown([*shown, *re.findall(r"`(bnnp [^`]+)`", prose)]) == []


def unknown(lines: list[str]) -> list[str]:
    """Return the commands of ours that there are not, or that lack an option which is shown."""
    app = importlib.import_module("bnnp.cli").app
    verbs = importlib.import_module("typer.main").get_command(app).commands
    found = []
    for line in lines:
        words = line.split("#")[0].split()
        if words[:1] != ["bnnp"] or len(words) < 2:
            continue
        options = {name for parameter in verbs[words[1]].params for name in parameter.opts} if words[1] in verbs else set()
        if words[1] not in verbs or any(word.split("=")[0] not in options | {"--help"} for word in words[2:] if word.startswith("-")):
            found.append(line)
    return found


def test_commands_that_are_not_there_are_found() -> None:
    lines = ["bnnp fit a.csv --task x --out m", "bnnp fit a.csv --tusk x", "bnnp fly", "make docs", "bnnp config  # --none"]
    assert unknown(lines) == lines[1:3]


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    _, prose = read((ROOT / page).read_text("utf-8"))
    assert broken_links(prose, (ROOT / page).parent) == []


def test_the_readme_shows_code_that_runs() -> None:
    blocks, _ = read((ROOT / "README.md").read_text("utf-8"))
    assert any(block.language == "python" and block.run for block in blocks)


PAGE = """# Title
```python
x = 1
```
```console
not python
```
<!-- not run: needs what is not here -->

```python
raise RuntimeError("this block is skipped")
```
- in a list
  ````python
  y = x + 1
  text = '''
  ```
  '''
  ````
"""


def test_blocks_share_a_namespace_and_skipped_ones_are_skipped() -> None:
    blocks, prose = read(PAGE)
    assert [(b.language, b.line, b.run) for b in blocks] == [
        ("python", 3, True),
        ("console", 6, True),
        ("python", 11, False),
        ("python", 15, True),
    ]
    assert run(blocks, "page.md")["y"] == 2
    assert "x = 1" not in prose


def test_a_block_that_fails_is_found_with_its_line() -> None:
    blocks, _ = read("text\n\n```python\nx = 1\nx / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run(blocks, "page.md")
    where = traceback.extract_tb(caught.tb)[-1]
    assert (where.filename, where.lineno) == ("page.md", 5)


def test_a_reason_covers_one_block_and_is_not_optional() -> None:
    block = "```python\n1 / 0\n```\n"
    assert [b.run for b in read(f"<!-- not run: slow -->\n{block}{block}")[0]] == [False, True]
    assert [b.run for b in read(f"<!-- not run: -->\n{block}")[0]] == [True]


def test_a_block_without_end_is_found() -> None:
    with pytest.raises(AssertionError, match="line 2 has no end"):
        read("```python\nx = 1\n")


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("")
    prose = """
        [a](there.md) [b](there.md#part) [c](https://example.org/x) [d](#part) [e](mailto:a@b.c) `[f](code.md)`
        ![g](gone.png) [h](<gone2.md>) [i](gone/there.md "title")
        <a href="there.md">j</a> <img src="gone.svg" width="3">
        [k]: gone3.md
    """
    assert broken_links(prose, tmp_path) == ["gone.png", "gone2.md", "gone/there.md", "gone.svg", "gone3.md"]


def test_console_blocks_run_where_all_their_commands_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = "```console\nbnnp config \\\n    --out a.toml  # settings\nbnnp version\n```\n<!-- printed -->\n```text\nbnnp  0.\n```\n"
    blocks, _ = read(page)
    assert blocks[0].commands == [["config", "--out", "a.toml"], ["version"]] and blocks[1].printed
    assert read("```console\nmake docs\nbnnp version\n```\n")[0][0].commands == []
    monkeypatch.chdir(tmp_path)
    run(blocks, "page.md")
    assert (tmp_path / "a.toml").is_file()
    with pytest.raises(AssertionError, match=r"page\.md:2: bnnp fit nothing.csv ended with 2"):
        run(read("```console\nbnnp fit nothing.csv\n```\n")[0], "page.md")
    with pytest.raises(AssertionError, match=r"page\.md:7 is not what was printed"):
        run(read("```console\nbnnp version\n```\n\n<!-- printed -->\n```text\nbnnp 9\n```\n")[0], "page.md")


# --- the site


@pytest.fixture(scope="module")
def conf() -> dict[str, object]:
    before = list(sys.path)
    try:
        return runpy.run_path(str(ROOT / "docs" / "conf.py"))
    finally:
        sys.path[:] = before


def listed() -> set[str]:
    """Return the pages that a table of contents names."""
    found: set[str] = set()
    for page in SITE_PAGES:
        for block in read((ROOT / page).read_text("utf-8"))[0]:
            if block.language == "{toctree}":
                names = [row.strip() for row in block.code.splitlines() if row.strip() and not row.startswith(":")]
                for name in names:
                    base = ROOT if name.startswith("/") else (ROOT / page).parent
                    found |= {p.relative_to(ROOT).as_posix() for p in base.glob(f"{name.lstrip('/')}.md")}
    return found


def test_every_page_of_the_site_is_in_a_table_of_contents() -> None:
    studies = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("experiments/*/README.md")}
    assert {*SITE_PAGES, *studies, "README.md", "CONTRIBUTING.md", "CHANGELOG.md"} == {*listed(), "docs/index.md"}


def documented() -> set[object]:
    """Return what the pages of the API show: what modules say is public, and what is named by itself."""
    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    modules = [importlib.import_module(name) for name in re.findall(r"automodule:: (\S+)", text)]
    shown = [getattr(module, name) for module in modules for name in module.__all__]
    for full in re.findall(r"auto(?:class|exception|function):: (\S+)", text):
        module, _, name = full.rpartition(".")
        shown.append(getattr(importlib.import_module(module), name))
    return {id(thing) for thing in shown}


@pytest.mark.parametrize(
    "package", ["bnnp", "bnnp.data", "bnnp.inference", "bnnp.comparison", "bnnp.workflow", "bnnp.rivals", "bnnp.report", "bnnp.explorer"]
)
def test_every_public_name_is_in_the_pages_of_the_api(package: str) -> None:
    pytest.importorskip("sklearn")
    there, module = documented(), importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    assert [name for name, thing in public.items() if callable(thing) and id(thing) not in there] == []


def test_docstrings_are_plain_text_but_for_code(conf: dict[str, object]) -> None:
    escape = conf["escape"]
    assert callable(escape)
    lines = [
        "Return |x| of `a*b` with shape (*S, *T) and **bold** words, y_n and model_ too.",
        "",
        "Arguments:",
        "    model_: a name_ that *is* no link.",
        "",
        "Example:",
        "    >>> f(*args)",
        "    [*1*]",
        "",
        "    After a_ it.",
    ]
    assert escape(lines) == [
        r"Return \|x\| of `a*b` with shape (\*S, \*T) and **bold** words, y_n and model\_ too.",
        "",
        "Arguments:",
        r"    model_: a name\_ that \*is\* no link.",
        "",
        "Example:",
        "    >>> f(*args)",
        "    [*1*]",
        "",
        r"    After a\_ it.",
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-c",
        "docs",
        "-d",
        str(tmp_path / "trees"),
        ".",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20 and (tmp_path / "site/docs/howto-table.html") in pages
    for page in pages:
        text = page.read_text("utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*\"", text), page
        anchors = [a for a in re.findall(r"<a [^>]*href=\"([^\"#:]+?\.html)(?:#[^\"]*)?\"", text) if not (page.parent / a).exists()]
        assert anchors == [], page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text("utf-8")), sheet
