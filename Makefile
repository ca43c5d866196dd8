# Every target does its own set-up: a machine with python3, pip and make needs nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)-oldest
BENCH := $(VENV)-bench

.PHONY: demo test test-all test-oldest check bench format clean

# A Ray of its own: the machine may have others, or their remains.
demo: $(READY)
	RAY_ADDRESS=local $(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/pytest -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/pytest $(ARGS)

# The lowest versions that pyproject.toml allows; several gigabytes, as its torch comes with CUDA. Their own
# warnings, and what that gloo prints, are not ours to test.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -o filterwarnings=default $(ARGS) \
		$(addprefix tests/test_,core.py launch.py run.py worker_process.py own_groups.py libraries.py \
		payload.py data_plane.py hosts.py template.py)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# With torchrunx, torchrun, Ray Train and Monarch beside us, in an environment of their own. ARGS=--quick: a first look.
bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/run.py $(ARGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv $(VENV); }
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt -e .
	touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt requirements-dev.txt
	$(PYTHON) -m venv $(OLDEST) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv $(OLDEST); }
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -r requirements-dev.txt -e .
	touch $@

$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv $(BENCH); }
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/requirements.txt -e .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(BENCH)
