# Bare `make` prints this help. Everything runs from .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH_VENV := .venv-bench
REQUIREMENTS := $(wildcard requirements*.txt)
# Off are the two that take every password of an example, in a test or a document, for a real one.
SECRETS := --disable-plugin KeywordDetector --disable-plugin BasicAuthDetector

.PHONY: help
help:  ## print this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(VENV)/.stamp-run: requirements.txt requirements-worker.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; write make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned requirements into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.stamp-dev: $(REQUIREMENTS) $(VENV)/.stamp-run
	@echo "installing what tests and benches need into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.PHONY: demo
demo: $(VENV)/.stamp-run  ## crawl Python's documentation through the task system, with the dashboard open
	@$(BIN)/python standalone.py --demo $(DEMO)

.PHONY: demo-appsflyer
demo-appsflyer: $(VENV)/.stamp-run  ## pull a stand-in for AppsFlyer, with its quotas, by two workers
	@$(BIN)/python scripts/demo_appsflyer.py

.PHONY: run
run: $(VENV)/.stamp-run  ## a master and one worker on this machine: python standalone.py
	@$(BIN)/python standalone.py

# Four processes also on two cores, since many tests wait. Every process that they start would compile all of our files
# anew where the environment forbids the compiled ones to be kept.
.PHONY: test
test: $(VENV)/.stamp-dev  ## all tests but the long ones, some four minutes on two cores
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

.PHONY: test-slow
test-slow: $(VENV)/.stamp-dev  ## the long tests
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m slow --timeout 1200 $(ARGS)

.PHONY: torture
torture: $(VENV)/.stamp-dev  ## kill, cut off and fill everything for SECONDS=60, and count what was lost; ARGS="--seed 1"
	@$(BIN)/python tests/torture/torture.py --seconds $(or $(SECONDS),60) $(ARGS)

.PHONY: power-cuts
power-cuts: $(VENV)/.stamp-dev  ## cut a busy master off its power CUTS=40 times, with SQLite's FULL and with NORMAL; needs cc
	@$(BIN)/python tests/torture/power_cuts.py --cuts $(or $(CUTS),40) $(ARGS)

.PHONY: fuzz
fuzz: $(VENV)/.stamp-dev  ## schemathesis (EXAMPLES=100 a route) and all bad input on all routes, and how much was tried
	@$(BIN)/python -m pytest -s --timeout 3600 tests/test_hostile_input.py tests/test_schemathesis.py

.PHONY: check
check: $(VENV)/.stamp-dev  ## ruff, mypy, secrets in the tree, and whether the generated documents are fresh
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run make format"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/python scripts/make_docs.py --check
	@$(BIN)/detect-secrets-hook $(SECRETS) $$(git ls-files)

# It asks the internet which of our pinned packages have known holes, so it is no part of make check.
.PHONY: audit
audit: $(VENV)/.stamp-dev  ## known holes in the packages that we pin; needs the internet
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	@$(BIN)/pip-audit -r requirements.txt -r requirements-crawl.txt
	@$(BIN)/pip-audit --no-deps -r requirements-edge.txt

.PHONY: format
format: $(VENV)/.stamp-dev  ## format the code
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

.PHONY: docs
docs: $(VENV)/.stamp-dev  ## make the generated documents again
	@$(BIN)/python scripts/make_docs.py

.PHONY: bench-dashboard
bench-dashboard: $(VENV)/.stamp-dev  ## how soon the dashboard shows a million tasks, and what an open one costs
	@$(BIN)/python bench/dashboard.py $(ARGS)

.PHONY: screenshots
screenshots: $(VENV)/.stamp-dev  ## photograph the dashboard of a working fleet for the README, some four minutes
	@$(BIN)/python scripts/make_screenshots.py

$(BENCH_VENV)/.stamp: requirements-bench.txt
	@test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	@echo "installing the task systems to compare with into $(BENCH_VENV) ..."
	@$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@touch $@

.PHONY: edge
edge: $(VENV)/.stamp-run  ## dist/worker.pyz: a whole device in one file, served by the master
	@$(BIN)/python scripts/make_edge.py

.PHONY: bench
bench: $(VENV)/.stamp-dev $(BENCH_VENV)/.stamp  ## end to end, bulk submit, idle latency, beside other task systems
	@$(BIN)/python bench/run.py $(ARGS)

.PHONY: profile
profile: $(VENV)/.stamp-dev  ## where the time of one task goes, step by step, in the master and in the workers
	@$(BIN)/python bench/profile.py $(ARGS)

.PHONY: bench-device
bench-device: $(VENV)/.stamp-dev  ## what a device costs: start to first task, idle memory and CPU
	@$(BIN)/python bench/device.py $(ARGS)

.PHONY: bench-fleet
bench-fleet: $(VENV)/.stamp-dev  ## a simulated fleet: 1,000 idle devices, 5,000 at work, 10,000 back after a kill
	@$(BIN)/python bench/fleet.py $(ARGS)

.PHONY: bench-scale
bench-scale: $(VENV)/.stamp-dev  ## the times of questions and of the flow from 1,000 to 1,000,000 tasks; ARGS="--rows 10000000" for more
	@$(BIN)/python bench/scale.py $(ARGS)

.PHONY: bench-crawl
bench-crawl: $(VENV)/.stamp-dev  ## pages/s of one and two devices on Debian's python3-doc
	@$(BIN)/python bench/crawl.py $(ARGS)

.PHONY: clean
clean:  ## remove .venv, dist and caches; never data, logs or output
	rm -rf $(VENV) dist $(BENCH_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
