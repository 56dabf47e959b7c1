# Everything runs in .venv, which `setup` makes and keeps up to date. Activation is never needed.

PYTHON ?= $(or $(shell for p in python3.11 python3; do $$p -c "" 2>/dev/null && echo $$p && break; done),python3)

# Batched factorisations of small matrices are slower with two threads than with one. Override: make demo OMP_NUM_THREADS=4
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

# Two workers halve the time of the tests; make test PARALLEL= runs them one after another.
PARALLEL ?= -n 2 --dist loadfile

.PHONY: setup demo test test-slow bench bench-context bench-engines bench-width docs screenshots format clean

setup: .venv/.stamp

# An editable install remembers where the tree was. After a move or a copy it points elsewhere, whatever the stamp says.
IN_PLACE := $(shell .venv/bin/python -I -c "import importlib.util as u, os; print(os.path.samefile(u.find_spec('bnnp').origin, 'src/bnnp/__init__.py'))" 2>/dev/null)
ifneq ($(IN_PLACE),True)
.PHONY: .venv/.stamp
endif

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else 'Expected Python 3.11 or newer. Got %d.%d. Use: make PYTHON=/path/to/python3.11' % v[:2])"
	@echo "Installing into .venv (one to two minutes the first time)"
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch .venv/.stamp

demo: setup
	.venv/bin/bnnp demo $(ARGS)

test: setup
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -q -m "not slow" $(PARALLEL) $(ARGS)

test-slow: setup
	.venv/bin/python -m pytest -q -m slow $(ARGS)

bench: setup
	.venv/bin/python -m benchmarks.step $(ARGS)

bench-context: setup
	OMP_NUM_THREADS=2 .venv/bin/python -m benchmarks.context $(ARGS)

bench-engines: setup
	.venv/bin/python -m benchmarks.engines $(ARGS)

bench-width: setup
	.venv/bin/python -m benchmarks.width $(ARGS)

# Needs a Chromium.
screenshots: setup
	.venv/bin/python -m benchmarks.screenshots $(ARGS)

# Into docs/_build/html, without network; a warning is an error.
docs: setup
	.venv/bin/python -m sphinx -W --keep-going -q -c docs -d docs/_build/doctrees . docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

format: setup
	.venv/bin/python -m ruff check --fix .
	.venv/bin/python -m ruff format .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo-output docs/_build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
