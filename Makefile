# make demo        simulate particles, reconstruct them, say where the results are
# make test        the tests, but for the slow ones
# make test-slow   the slow ones: whole runs on the virtual device, compilation for GPUs, long fuzzing, a browser
# make docs        the site, in build/docs
# make wheel       a wheel for this machine and an sdist, in dist
# All make .venv first if there is none, and install what has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt README.md $(shell find src native -type f -not -name '*.pyc')

.PHONY: demo test test-slow lint docs wheel clean

demo: $(VENV)/.installed
	@rm -rf demo
	$(BIN)/emsplat simulate -o demo/particles --particles 3000
	$(BIN)/emsplat reconstruct demo/particles/particles.star -o demo/run
	$(BIN)/emsplat fsc demo/run/run_class001.mrc demo/particles/truth.mrc | tail -n 3
	@echo "The map is demo/run/run_class001.mrc, its FSC demo/run/fsc.png, the report demo/run/report.html"

test: $(VENV)/.tested
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(VENV)/.tested
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto -m slow

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.documented
	$(BIN)/python -m sphinx -W --keep-going -q -d build/doctrees docs build/docs
	@echo "The site begins at build/docs/index.html"

wheel: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	$(BIN)/python -m build --outdir dist .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[test]'
	@touch $@

# The tools alone: the site is made from the sources, and nothing has to be compiled for it.
$(VENV)/.documented: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

clean:
	rm -rf $(VENV) build dist demo docs/generated
