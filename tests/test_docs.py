"""The pages tell the truth: every Python block runs, every relative link leads somewhere.

The blocks of one page share a namespace and run in order in an empty folder. A block that cannot run says why, in a
comment on a line of its own above it: `<!-- not run: needs a GPU -->`.
"""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/**/*.md"))]

FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,}|~{3,}) *(?P<language>[\w+-]*)")
SKIP = re.compile(r"^\s*<!-- not run: \S.*-->\s*$")
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=\"([^\"]+)\"|^\s*\[[^\]]+\]:\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """Hold one fenced block: its language, the line its code starts on, the code, and whether it is to be run."""

    language: str
    line: int
    code: str
    run: bool


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
            blocks.append(Block(opening["language"], start, code, not SKIP.match(above)))
            # A comment speaks of one block only.
            prose.append("(block)")
            opening = None
    assert opening is None, f"the block that starts at line {start} has no end"
    return blocks, "\n".join(prose)


def run(blocks: list[Block], name: str) -> dict[str, object]:
    """Run the Python blocks in one namespace; a traceback names the page and its line."""
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        if block.language == "python" and block.run:
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
    return namespace


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
    run(blocks, page)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


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
