# Every target does its own set-up: a machine with python3, pip and make needs nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
BENCH := $(VENV)-bench
DOCS := $(VENV)-docs
INTEGRATIONS := $(VENV)-integrations
DIST := $(VENV)-dist
EMPTY := $(VENV)-empty
CORE := $(addprefix tests/test_,core.py launch.py run.py worker_process.py own_groups.py libraries.py \
	payload.py functions.py script.py data_plane.py hosts.py template.py)

# Debian's python3 may lack venv.
environment = $(PYTHON) -m venv $(1) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv $(1); }

# Tests run side by side, in lanes that cannot see each other; one after the other if the machine gives no namespaces.
# A test that hangs is ended by a signal: with its process, pytest-xdist may wait for ever for the one that replaces it.
LANES ?= 3
in_lanes = $(shell tests/lane true >/dev/null 2>&1 && \
	echo "-o timeout_method=signal --dist loadgroup --tx '$(LANES)*popen//python=tests/lane $(1)/python'")

.PHONY: environments demo test test-ci test-alone test-all test-oldest test-newest test-integrations check bench chaos docs dist format clean

# A Ray of its own: the machine may have others, or their remains.
demo: $(READY)
	RAY_ADDRESS=local $(BIN)/python examples/quickstart.py

# Every guarantee of README that one Ray on one node can show.
test: $(READY)
	$(BIN)/pytest $(call in_lanes,$(BIN)) -m "not slow and not exhaustive and not alone" $(ARGS)

test-ci: $(READY)
	$(BIN)/pytest $(call in_lanes,$(BIN)) -m "not exhaustive and not alone" $(ARGS)

# What measures time or takes much memory has the machine for itself.
test-alone: $(READY)
	$(BIN)/pytest -m "alone and not exhaustive" $(ARGS)

# Both parts run, and the worse status counts. 5 says that ARGS selects no test there.
test-all: $(READY)
	$(BIN)/pytest -m "alone" $(ARGS); alone=$$?; \
	$(BIN)/pytest $(call in_lanes,$(BIN)) -m "not alone" $(ARGS); lanes=$$?; \
	[ $$alone -ne 5 ] || alone=$$lanes; [ $$lanes -ne 5 ] || lanes=$$alone; \
	[ $$alone -ge $$lanes ] || alone=$$lanes; exit $$alone

# The lowest versions that pyproject.toml allows; several gigabytes, as its torch comes with CUDA. Their own
# warnings, and what that gloo prints, are not ours to test.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -o filterwarnings=default $(ARGS) $(CORE)

# The newest releases, as a fresh `pip install` takes them today, so they are looked for at every call. Only torch
# is pinned: its newest release comes with CUDA and gigabytes, where the pinned one may be there as a build for CPUs.
test-newest:
	test -x $(NEWEST)/bin/python || { $(call environment,$(NEWEST)) }
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		$(shell grep ^torch== constraints.txt) -r requirements-dev.txt -e .
	$(NEWEST)/bin/python -m pytest $(ARGS) $(CORE) $(addprefix tests/test_,command_line.py notebook.py stacks.py)

# The examples that train with other libraries, in an environment that has those. DeepSpeed looks for ninja on the PATH.
test-integrations: $(INTEGRATIONS)/.ready
	PATH="$(abspath $(INTEGRATIONS))/bin:$$PATH" $(INTEGRATIONS)/bin/python -m pytest \
		$(call in_lanes,$(INTEGRATIONS)/bin) --timeout 300 tests/integrations $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# With torchrunx, torchrun, Ray Train and Monarch beside us, in an environment of their own. ARGS=--quick: a first look.
bench: $(BENCH)/.ready
	$(BENCH)/bin/python benchmarks/run.py $(ARGS)

# A training under random kills, which must end as if nothing had happened; needs root. ARGS="--shape spares": spares.
chaos: $(READY)
	tests/lane $(BIN)/python -m tests.chaos --seed $(or $(SEED),0) --minutes $(or $(MINUTES),1) $(ARGS)

# Into site/. It ends at a link or an anchor that leads nowhere.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

# Into dist/: what a release would upload. The wheel is tried where nothing else is, with the sdist's quickstart.
dist: $(DIST)/.ready
	rm -rf dist $(EMPTY)
	$(DIST)/bin/python -m build --no-isolation
	$(DIST)/bin/python -m twine check --strict dist/*
	$(DIST)/bin/python tests/check_dist.py
	$(call environment,$(EMPTY))
	$(EMPTY)/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	$(EMPTY)/bin/python -m pip check
	tar -xzf dist/*.tar.gz -C $(EMPTY) --strip-components 2 --wildcards '*/examples/quickstart.py'
	cd $(EMPTY) && RAY_ADDRESS=local bin/python quickstart.py > quickstart.out
	grep "^both ranks hold equal parameters: True" $(EMPTY)/quickstart.out
	rm -rf $(EMPTY)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What .ci/run needs; pip uses one core, so `make --jobs 2 environments`.
environments: $(READY) $(DOCS)/.ready $(INTEGRATIONS)/.ready $(DIST)/.ready

$(READY): pyproject.toml constraints.txt requirements-dev.txt
	$(call environment,$(VENV))
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt -e .
	touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt requirements-dev.txt
	$(call environment,$(OLDEST))
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -r requirements-dev.txt -e .
	touch $@

$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(call environment,$(BENCH))
	$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -r benchmarks/requirements.txt -e .
	touch $@

$(DOCS)/.ready: requirements-docs.txt
	$(call environment,$(DOCS))
	$(DOCS)/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

$(INTEGRATIONS)/.ready: pyproject.toml constraints.txt requirements-integrations.txt
	$(call environment,$(INTEGRATIONS))
	$(INTEGRATIONS)/bin/python -m pip install --quiet -c constraints.txt -r requirements-integrations.txt -e .
	touch $@

$(DIST)/.ready: requirements-dist.txt
	$(call environment,$(DIST))
	$(DIST)/bin/python -m pip install --quiet -r requirements-dist.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(BENCH) $(DOCS) $(INTEGRATIONS) $(DIST) $(EMPTY) dist site
