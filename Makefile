# make demo and make test need Python 3.11, 3.12 or 3.13 (with venv) and a network connection for the first pip install.
# Another interpreter: make test PYTHON=python3.12. Another place for the environment: make test VENV=/some/folder.
PYTHON ?= python3
VENV ?= .venv
# The oldest admitted libraries have an environment of their own, and wheels for Python 3.11 alone.
LOWEST ?= .venv-lowest
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-lowest soak lint types bench gpu-bench costs methods clean

help:
	@echo "make demo   distil an embedded teacher on this machine and compare both"
	@echo "make test   the test suite"
	@echo "make test-lowest  the tests on a user's path, with the oldest library versions that are admitted (Python 3.11)"
	@echo "make soak   the long forms of the tests that are cut short in make test"
	@echo "make lint   ruff, its formatter, and the type checker"
	@echo "make types  the type checker alone"
	@echo "make bench  what the training core costs on this machine (BENCH_ARGS=\"--part steps\" selects)"
	@echo "make gpu-bench  what is to be measured on a GPU, in ten minutes; skipped without one"
	@echo "make costs  latency of the embedded teachers, and memory of LoRA roles, full copies and plans"
	@echo "make methods  every method on the embedded teachers, in cells: one table, one picture (hours; goes on where it stopped)"
	@echo "make clean  remove the environment and build products"

demo: $(VENV)/.demo
	$(VENV)/bin/fewstep demo $(DEMO_ARGS)

# Where the environment forbids it to Python, every process that a test starts would compile all that it imports anew.
test test-lowest soak: export PYTHONDONTWRITEBYTECODE =

# One worker for each core, one thread in each; a file stays on one worker, so that what it makes is made once. The
# longest files come first (tests/conftest.py).
test: $(VENV)/.test
	$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder --timeout 900 $(PYTEST_ARGS)

# The way of a user, from the demo to a student in other hands, with the oldest versions that pyproject.toml admits.
ON_THE_PATH := tests/cli/test_demo.py tests/fashion tests/recording/test_pipelines.py tests/teachers/test_weights.py \
	tests/teachers/test_source.py tests/teachers/test_single_file.py tests/export/test_whole.py tests/export/test_lora.py \
	tests/end_to_end/test_full.py tests/eval/test_evaluate.py tests/kernels/test_tangents.py

test-lowest: $(LOWEST)/.lowest
	$(LOWEST)/bin/python -m pytest $(ON_THE_PATH) --timeout 900 $(PYTEST_ARGS)

soak: $(VENV)/.test
	$(RUN) -m pytest -m soak $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@$(MAKE) --no-print-directory types

# The checker sees the package as it is installed, with trainers/, pipelines/ and eval/ inside it.
types: $(VENV)/.dev
	@rm -rf build/types && mkdir -p build/types && cp -R fewstep build/types/ && cp -R trainers pipelines eval build/types/fewstep/
	cd build/types && $(abspath $(RUN)) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

bench: $(VENV)/.demo
	$(VENV)/bin/fewstep bench $(BENCH_ARGS)

gpu-bench: $(VENV)/.demo
	$(RUN) -m fewstep.eval.bench.gpu

# Timings are measured anew each time: finished rows of an evaluation are kept and would be reused.
costs: $(VENV)/.demo
	rm -rf runs/costs
	for teacher in fashion-sd fashion-flow; do $(RUN) -c "import sys; from fewstep.eval import evaluate; \
	print(evaluate([], teacher=sys.argv[1], metrics=['speed'], num=200, out='runs/costs/' + sys.argv[1]).table())" \
	$$teacher || exit 1; done
	$(RUN) -m fewstep.eval.memory roles
	$(RUN) -m fewstep.eval.memory plans

# A cell that is finished, and whose recipe has not changed since, is not run again.
methods: $(VENV)/.demo
	$(RUN) -m fewstep.eval.methods --readme docs/methods.md $(METHODS_ARGS)

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info

# One stamp for each set of packages; pip runs again only when pyproject.toml has changed. venv writes bin/pip last.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	|| { echo "fewstep needs Python 3.11, 3.12 or 3.13; try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/pip
	$(INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/pip
	$(INSTALL) -e ".[test]"
	@touch $@

$(LOWEST)/.lowest: pyproject.toml .ci/lowest_versions.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	|| { echo "the oldest admitted libraries are there for Python 3.11; try: make test-lowest PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python .ci/lowest_versions.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -c $(LOWEST)/constraints.txt -e ".[test]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/pip
	$(INSTALL) -e ".[dev]"
	@touch $@
