"""Laws about the tree: who may import whom, who factorises, what nobody touches, how large a thing may grow.

Each law takes one module and returns what is wrong with it, so that it is shown to fail on a bad source as well as to
hold on the tree. To change a law is to change the design: say so in the commit.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "bnnp"

# What the core stands on: numerics, data and catalogues of structures, that know nothing of networks and posteriors.
BASE = [
    "seeds",
    "progress",
    "importance",
    "mixtures",
    "tails",
    "linalg",
    "tasks",
    "scaling",
    "likelihoods",
    "factors",
    "structures",
    "priors",
]
# A core module imports only from those before it.
CORE = [
    *BASE,
    "conjugate",
    "draws",
    "layers",
    "wide",
    "streaming",
    "particles",
    "predictive",
    "chain",
    "posterior",
    "networks",
    "objectives",
]
# An edge module imports the core, and of the edge only what is named here.
EDGE: dict[str, set[str]] = {
    "evaluation": set(),
    "calibration": set(),
    "checkpoint": set(),
    "settings": set(),
    "intake": {"data", "settings"},
    "training": {"checkpoint", "evaluation", "intake", "settings"},
    "choice": {"checkpoint", "evaluation", "settings", "training"},
    "reading": {"evaluation"},
    "trust": {"calibration"},
    "plots_comparison": {"plots"},
    "comparison": {"checkpoint", "evaluation", "inference", "plots_comparison"},
    "inference": {"checkpoint"},
    "data": set(),
    "plots": set(),
    "plots_prior": {"plots", "reading"},
    "runs": {"checkpoint", "data"},
    "rivals": {"data", "evaluation"},
    "plots_data": {"data", "plots", "runs"},
    "report": {"checkpoint", "data", "evaluation", "plots", "plots_data", "rivals", "runs"},
    "explorer": {"checkpoint", "data", "runs"},
    "config": set(),
    "sizes": {"config", "data"},
    "workflow": {"checkpoint", "config", "data", "evaluation", "export", "plots_data", "report", "runs", "sizes", "training", "trust"},
    "estimator": {"checkpoint", "training"},
    "export": {"data", "runs"},
}
EVERYTHING = {*CORE, *EDGE}
EDGE |= {
    "__init__": EVERYTHING,
    "demos": EVERYTHING | {"bnnp"},
    "console": {"config", "evaluation", "training"},
    "commands": EVERYTHING | {"console"},
    "cli": EVERYTHING | {"bnnp", "commands", "console", "demos"},
    "__main__": {"cli"},
}
REQUIRED = {"torch", "numpy", "safetensors"}
OPTIONAL = set(
    "PIL anyio arviz laplace matplotlib mpl_toolkits netCDF4 pandas polars posteriors pyarrow pyro rich scipy sklearn starlette typer "
    "uvicorn wfdb xarray zarr".split()
)
# What cannot be used at all without its optional package, and is imported by nothing but its user.
NEEDS_ITS_EXTRA = {"cli", "commands", "console", "estimator"}
CORE_ONLY = {"torch", "numpy"}

FACTORISING = set(
    "cholesky cholesky_ex cholesky_inverse cholesky_solve cho_factor cho_solve solve solve_ex solve_triangular "
    "triangular_solve inv inv_ex inverse pinv pinverse det logdet slogdet lu lu_factor lu_factor_ex lu_solve "
    "ldl_factor ldl_factor_ex ldl_solve lstsq qr svd svdvals eig eigh eigvals eigvalsh cond matrix_rank tensorinv "
    "tensorsolve".split()
)
# Methods whose name alone gives them away, and those that do so when called without arguments.
TENSOR_METHODS = {"cholesky", "cholesky_inverse", "cholesky_solve", "triangular_solve", "logdet", "slogdet", "pinverse"}
BARE_METHODS = {"inverse", "det", "qr", "svd", "lu"}
GLOBAL_STATE = set(
    "torch.manual_seed torch.seed torch.random.manual_seed torch.random.seed torch.cuda.manual_seed "
    "torch.cuda.manual_seed_all torch.set_rng_state torch.set_default_dtype torch.set_default_device "
    "torch.set_default_tensor_type numpy.random.seed random.seed warnings.filterwarnings warnings.simplefilter "
    "logging.basicConfig matplotlib.use matplotlib.rc matplotlib.rcParams matplotlib.style.use matplotlib.pyplot.rc "
    "matplotlib.pyplot.rcParams matplotlib.pyplot.style.use matplotlib.pyplot.switch_backend".split()
)
FILE_BUDGET, FUNCTION_BUDGET, CORE_BUDGET = 400, 60, 2500

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """Hold one module of the package: its dotted name inside the package, and its source."""

    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def unit(self) -> str:
        """Return the top-level module or folder, which the laws of import speak of."""
        return self.name.split(".")[0]

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def imported(self, root: ast.AST) -> Iterator[tuple[int, str, str]]:
        """Yield (line, full name, local name) of everything imported under a node."""
        for node in ast.walk(root):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    local = alias.asname or alias.name.split(".")[0]
                    yield node.lineno, alias.name, local
            elif isinstance(node, ast.ImportFrom):
                parts = f"bnnp.{self.name}".split(".")[: -node.level] if node.level else []
                base = ".".join([*parts, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}", alias.asname or alias.name

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Return the full name of every local name that an import binds."""
        rows = list(self.imported(self.tree))
        # `import a.b` binds a, every other form binds what it names.
        return {local: local if full.split(".")[0] == local else full for _, full, local in rows}

    def dotted(self, node: ast.expr) -> str:
        """Return the full name an expression stands for; what is no import starts with '?'."""
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value)}.{node.attr}"
        return self.aliases.get(node.id, "?") if isinstance(node, ast.Name) else "?"

    @cached_property
    def code_lines(self) -> set[int]:
        """Return the numbers of the lines that are not blank, comment or docstring."""
        silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
            if token.type not in silent:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
                lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        return lines


def unit_of(full: str) -> str | None:
    """Return the unit of the package that a full name belongs to ('bnnp' for the package itself), None outside it."""
    parts = full.split(".")
    if parts[0] != "bnnp":
        return None
    known = len(parts) > 1 and (parts[1] in CORE or parts[1] in EDGE)
    return parts[1] if known else "bnnp"


def imports_upwards(module: Module) -> list[str]:
    """Core: from modules before it, torch and numpy. Edge: the core and what the table grants. No unlisted unit."""
    own = module.unit
    if own in CORE:
        granted = {*CORE[: CORE.index(own)], *([own] if module.name != own else [])}
    elif own in EDGE:
        granted = {*CORE, *EDGE[own], own} if own != "__main__" else EDGE[own]
    else:
        return [f"{module.name} is not in the design: give it a place in CORE or EDGE"]
    problems = []
    for line, full, _ in module.imported(module.tree):
        unit, top = unit_of(full), full.split(".")[0]
        if unit is not None and unit not in granted:
            problems.append(f"{module.name}:{line} imports {full}")
        if unit is None and own in CORE and top not in CORE_ONLY | sys.stdlib_module_names:
            problems.append(f"{module.name}:{line} imports {full}: the core needs torch and numpy only")
    return problems


def imports_stand_at_the_top(module: Module) -> list[str]:
    """Inside functions only optional packages; at the top only required ones (what needs its extra: optional too, types: all)."""
    inside = {row for function in module.functions for row in module.imported(function)}
    for_types = {
        row
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for row in module.imported(node)
    }
    at_top = REQUIRED | {"bnnp"} | (OPTIONAL if module.unit in NEEDS_ITS_EXTRA else set()) | sys.stdlib_module_names
    problems = []
    for row in module.imported(module.tree):
        line, full, _ = row
        top = full.split(".")[0]
        if row in inside and top not in OPTIONAL:
            problems.append(f"{module.name}:{line} imports {full} inside a function")
        if row not in inside and top not in (at_top | OPTIONAL if row in for_types else at_top):
            problems.append(f"{module.name}:{line} needs {full}, which is optional or unknown, to be imported at all")
    return problems


def only_linalg_factorises(module: Module) -> list[str]:
    """Factorisations, solves and inverses stand in linalg.py alone; a rival in demos/ may use numpy's."""
    if module.name == "linalg":
        return []
    # A rival shares no code with what it is compared with.
    libraries = {"torch"} if module.unit == "demos" else {"torch", "numpy", "scipy"}
    named = [(line, full) for line, full, _ in module.imported(module.tree)]
    named += [(node.lineno, module.dotted(node)) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    problems = []
    for line, full in named:
        head, _, last = full.rpartition(".")
        library = head.split(".")[0] in libraries and last in FACTORISING
        if library or (head.startswith("?") and last in TENSOR_METHODS):
            problems.append(f"{module.name}:{line} names {full}: use bnnp.linalg")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and not node.args and not node.keywords:
            full = module.dotted(node.func)
            if full.startswith("?.") and full.rpartition(".")[2] in BARE_METHODS:
                problems.append(f"{module.name}:{node.lineno} calls {full}(): use bnnp.linalg")
    return problems


def no_global_state(module: Module) -> list[str]:
    """Nothing that outlives the call is set: seeds, default dtype or device, warning filters, logging, rcParams."""
    named = [(line, full) for line, full, _ in module.imported(module.tree)]
    named += [(node.lineno, module.dotted(node)) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    return [f"{module.name}:{line} names {full}" for line, full in named if full in GLOBAL_STATE]


def has_a_docstring(module: Module) -> list[str]:
    """Every module says why it exists."""
    return [] if ast.get_docstring(module.tree) else [f"{module.name} has no docstring"]


def is_annotated(module: Module) -> list[str]:
    """Every argument and every return has a type."""
    problems = []
    for function in module.functions:
        spec = function.args
        arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        bare += ["the return"] if function.returns is None else []
        if bare:
            problems.append(f"{module.name}:{function.lineno} {function.name} lacks a type for {', '.join(bare)}")
    return problems


def keeps_to_its_budget(module: Module) -> list[str]:
    """A file has at most 400 lines of code, a function at most 60."""
    problems = []
    if len(module.code_lines) > FILE_BUDGET:
        problems.append(f"{module.name} has {len(module.code_lines)} lines of code, budget {FILE_BUDGET}")
    for function in module.functions:
        size = len(module.code_lines & set(range(function.lineno, (function.end_lineno or 0) + 1)))
        if size > FUNCTION_BUDGET:
            problems.append(f"{module.name}:{function.lineno} {function.name} has {size}, budget {FUNCTION_BUDGET}")
    return problems


LAWS: dict[str, Callable[[Module], list[str]]] = {
    law.__name__: law
    for law in (
        imports_upwards,
        imports_stand_at_the_top,
        only_linalg_factorises,
        no_global_state,
        has_a_docstring,
        is_annotated,
        keeps_to_its_budget,
    )
}


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    paths = sorted(SRC.rglob("*.py"))
    return [Module(".".join(p.relative_to(SRC).with_suffix("").parts), p.read_text("utf-8")) for p in paths]


@pytest.mark.parametrize("law", LAWS)
def test_the_tree_keeps_the_law(law: str, modules: list[Module]) -> None:
    problems = [problem for module in modules for problem in LAWS[law](module)]
    assert not problems, "\n".join([LAWS[law].__doc__ or "", *problems])


def test_the_core_is_complete_and_small(modules: list[Module]) -> None:
    sizes = dict.fromkeys((module.unit for module in modules if module.unit in CORE), 0)
    for module in modules:
        if module.unit in CORE:
            sizes[module.unit] += len(module.code_lines)
    assert sorted(sizes) == sorted(CORE), "the laws speak of modules that are not there"
    assert sum(size for name, size in sizes.items() if name not in BASE) <= CORE_BUDGET, sizes


def lines(n: int, indent: str = "") -> str:
    return "".join(f"{indent}x = {i}\n" for i in range(n))


BAD = [
    ("imports_upwards", "tasks", "from bnnp.priors import PRIORS"),
    ("imports_upwards", "tasks", "from bnnp import priors"),
    ("imports_upwards", "tasks", "import bnnp.priors"),
    ("imports_upwards", "tasks", "from . import priors"),
    ("imports_upwards", "tasks", "from .priors import PRIORS"),
    ("imports_upwards", "tasks", "def f() -> None:\n    from bnnp import priors"),
    ("imports_upwards", "tasks", "from bnnp.tasks import Task"),
    ("imports_upwards", "likelihoods.base", "from bnnp.priors import PRIORS"),
    ("imports_upwards", "networks", "from bnnp import BNNP"),
    ("imports_upwards", "networks", "from bnnp.checkpoint import save"),
    ("imports_upwards", "networks", "import sklearn"),
    ("imports_upwards", "evaluation", "from bnnp.training import meta_train"),
    ("imports_upwards", "data.synthetic", "from bnnp.plots import plot"),
    ("imports_upwards", "data.synthetic", "from ..plots import plot"),
    ("imports_upwards", "checkpoint", "from bnnp import __version__"),
    ("imports_upwards", "demos.one", "from bnnp.cli import main"),
    ("imports_upwards", "training", "from bnnp.demos import one"),
    ("imports_upwards", "utils", "x = 1"),
    ("imports_stand_at_the_top", "training", "def f() -> None:\n    import json"),
    ("imports_stand_at_the_top", "training", "class A:\n    def f(self) -> None:\n        from bnnp import priors"),
    ("imports_stand_at_the_top", "plots", "import matplotlib.pyplot as plt"),
    ("imports_stand_at_the_top", "plots", "import pandas"),
    ("imports_stand_at_the_top", "plots", "def f() -> None:\n    import seaborn"),
    ("only_linalg_factorises", "conjugate", "import torch\nR = torch.linalg.cholesky(M)"),
    ("only_linalg_factorises", "conjugate", "import torch\nR = torch.cholesky_solve(b, M)"),
    ("only_linalg_factorises", "conjugate", "import torch.linalg as la\nR = la.inv(M)"),
    ("only_linalg_factorises", "conjugate", "from torch import linalg\nR = linalg.solve_triangular(M, b, upper=True)"),
    ("only_linalg_factorises", "conjugate", "from torch.linalg import eigh"),
    ("only_linalg_factorises", "data.synthetic", "import numpy as np\nR = np.linalg.cholesky(M)"),
    ("only_linalg_factorises", "demos.one", "import torch\nR = torch.linalg.cholesky(M)"),
    ("only_linalg_factorises", "conjugate", "R = M.cholesky()"),
    ("only_linalg_factorises", "conjugate", "R = (M + N).inverse()"),
    ("no_global_state", "training", "import torch\ntorch.manual_seed(0)"),
    ("no_global_state", "training", "from torch import manual_seed"),
    ("no_global_state", "training", "import torch as t\nt.set_default_dtype(t.float64)"),
    ("no_global_state", "training", "import numpy as np\nnp.random.seed(0)"),
    ("no_global_state", "training", "import warnings\nwarnings.filterwarnings('ignore')"),
    ("no_global_state", "training", "import warnings\nwarnings.simplefilter('ignore')"),
    ("no_global_state", "training", "import logging\nlogging.basicConfig()"),
    (
        "no_global_state",
        "plots",
        "def f() -> None:\n    import matplotlib.pyplot as p\n    p.rcParams['font.size'] = 1",
    ),
    ("has_a_docstring", "tasks", "# Why this exists.\nx = 1"),
    ("is_annotated", "tasks", "def f(x) -> None: ..."),
    ("is_annotated", "tasks", "def f(x: int): ..."),
    ("is_annotated", "tasks", "class A:\n    async def f(self, *args, **kwargs: int) -> None: ..."),
    ("keeps_to_its_budget", "tasks", lines(FILE_BUDGET + 1)),
    ("keeps_to_its_budget", "tasks", "def f() -> None:\n" + lines(FUNCTION_BUDGET, "    ")),
]
GOOD = [
    (
        "imports_upwards",
        "priors",
        "from __future__ import annotations\nimport math\nimport torch\nfrom bnnp.tasks import Task",
    ),
    ("imports_upwards", "likelihoods.labels", "from bnnp.likelihoods.base import Likelihood"),
    ("imports_upwards", "training", "from bnnp.checkpoint import save\nfrom bnnp.objectives import OBJECTIVES"),
    ("imports_upwards", "data.synthetic", "from bnnp.data.table import read\nfrom ..tasks import Task"),
    ("imports_upwards", "demos.one", "import bnnp\nfrom bnnp import BNNP, plots\nfrom bnnp.demos.two import f"),
    ("imports_upwards", "cli", "from bnnp import demos\nimport typer"),
    ("imports_stand_at_the_top", "plots", "def f() -> None:\n    import matplotlib.pyplot as plt"),
    ("imports_stand_at_the_top", "plots", "if TYPE_CHECKING:\n    from matplotlib.axes import Axes"),
    ("imports_stand_at_the_top", "cli", "import typer"),
    ("only_linalg_factorises", "linalg", "import torch\nR = torch.linalg.cholesky(M)"),
    ("only_linalg_factorises", "conjugate", "from bnnp import linalg\nR = linalg.cholesky(M)"),
    ("only_linalg_factorises", "conjugate", "from bnnp.linalg import cholesky\nR = cholesky(M)"),
    ("only_linalg_factorises", "demos.one", "import numpy as np\nR = np.linalg.cholesky(M)"),
    ("only_linalg_factorises", "posterior", "import torch\ny = scaler.inverse(x) + torch.linalg.vector_norm(x)"),
    ("no_global_state", "training", "import torch\ng = torch.Generator().manual_seed(0)\ng.manual_seed(1)"),
    ("no_global_state", "training", "import warnings\nwarnings.warn('x', stacklevel=2)"),
    ("no_global_state", "training", "import warnings\nwith warnings.catch_warnings(action='ignore'): ..."),
    ("has_a_docstring", "tasks", '"""Why this exists."""'),
    ("is_annotated", "tasks", "class A:\n    def f(self, x: int, *args: int, **kwargs: int) -> None: ..."),
    ("keeps_to_its_budget", "tasks", '"""Doc.\n\n' + "doc\n" * FILE_BUDGET + '"""\n' + lines(FILE_BUDGET)),
    (
        "keeps_to_its_budget",
        "tasks",
        'def f() -> None:\n    """Doc."""\n    # why\n\n' + lines(FUNCTION_BUDGET - 1, "    "),
    ),
]


@pytest.mark.parametrize(("law", "name", "source"), BAD)
def test_a_law_finds_what_is_bad(law: str, name: str, source: str) -> None:
    assert LAWS[law](Module(name, source))


@pytest.mark.parametrize(("law", "name", "source"), GOOD)
def test_a_law_accepts_what_is_good(law: str, name: str, source: str) -> None:
    assert LAWS[law](Module(name, source)) == []


def test_every_law_has_been_seen_to_fail() -> None:
    assert {law for law, _, _ in BAD} == {law for law, _, _ in GOOD} == set(LAWS)
