# make live   set up what performing needs, and perform
# make test   set up everything, check the code, run all tests
# Others: setup, check, format, test-realtime, clean

PYTHON ?= python3
VENV := .venv
REALTIME_VENV := .venv-realtime
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)
# A process that crashes ends the run: with another one in its place pytest-xdist would wait for ever.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile --max-worker-restart 0
APT := DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300

.PHONY: live test check format setup test-realtime clean

live: $(VENV)/.live
	$(BIN)/restyle live

# Two processes of one thread each; JACK servers one after the other, with the machine to themselves.
test: setup check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not jack" $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m jack
	$(MAKE) test-realtime

# The engine's own tests where torch is not installed.
test-realtime: $(REALTIME_VENV)/.ready
	! $(REALTIME_VENV)/bin/python -c "import torch" 2>/dev/null
	$(REALTIME_VENV)/bin/python -m pytest -m "not jack" $(SIDE_BY_SIDE)

setup: $(VENV)/.dev

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) $(REALTIME_VENV) build *.egg-info

$(VENV)/.live: pyproject.toml | $(VENV)/.created
	@sh tools/system-packages.sh "$(SUDO)" "$(APT)" libportaudio2
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	@sh tools/system-packages.sh "$(SUDO)" "$(APT)" libportaudio2 jackd2
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/.live

$(REALTIME_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(REALTIME_VENV)
	$(REALTIME_VENV)/bin/python -m pip install --quiet --editable ".[test]"
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c "import ensurepip" 2>/dev/null || sh tools/system-packages.sh "$(SUDO)" "$(APT)" python3-venv
	$(PYTHON) -m venv $(VENV)
	@touch $@
