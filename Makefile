# `make help` lists the targets. Everything is made in .venv and build/; nothing is installed elsewhere.
PYTHON ?= python3
ARGS ?=
MINUTES ?= 30
TESTS ?= tests/test_layers.py tests/unit tests/e2e
VENV := .venv
PIP := $(VENV)/bin/pip -qq --disable-pip-version-check
RUN := $(VENV)/bin/python
NODE_TESTS := tests/e2e/node
SOURCES := fastsig/_relay.pyx $(wildcard fastsig/*.h fastsig/*.pxd)
SHELL := /bin/sh
# What the extension was built with: a change of it builds anew.
FLAGS := debug=$(FASTSIG_DEBUG) coverage=$(FASTSIG_COVERAGE) annotate=$(FASTSIG_ANNOTATE) cc=$(CC) cflags=$(CFLAGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint build bench bench-full bench-page faults loadtest hostile moves guard guard-baseline conformance fuzz asan soak panels annotate coverage wheel clean force

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: build ## build, then serve on port 8080 (ARGS="--port 9000" for options)
	@exec $(VENV)/bin/fastsig serve $(ARGS)

test: build $(VENV)/.dev $(NODE_TESTS)/node_modules/.stamp ## run all tests, or some (TESTS=tests/unit ARGS="-k name")
	@echo "fastsig: testing"
	@$(RUN) -m pytest $(TESTS) $(ARGS)

lint: build $(VENV)/.dev ## check style, types, the stub of the extension, the Dockerfile and .ci/run
	@echo "fastsig: checking style and types"
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --quiet --check .
	@PATH="$(VENV)/bin:$$PATH" cython-lint fastsig
	@$(VENV)/bin/mypy --no-error-summary
	@$(RUN) -m mypy.stubtest --concise --ignore-disjoint-bases --ignore-unused-allowlist \
	    --allowlist tests/stubtest.allow fastsig._relay
	@$(VENV)/bin/hadolint Dockerfile
	@sh -n .ci/run

build: $(VENV)/.built ## make the environment and build the extension in place

bench: build ## measure the server beside others, for some minutes (ARGS="--peers limit,fastsig --tests relayN-200")
	@$(RUN) -m loadtest.bench.run $(ARGS)

bench-full: build ## measure everything on a quiet machine, for half an hour, and write docs/benchmarks.md
	@$(RUN) -m loadtest.bench.run --full $(ARGS)

bench-page: build ## write docs/benchmarks.md from build/bench.json, also of a partial run
	@$(RUN) -m loadtest.bench.page

faults: build $(VENV)/.dev ## kill, stop and drain servers under load, for minutes (ARGS="kill --workers 4 --rounds 20")
	@$(RUN) -m loadtest.faults $(ARGS)

loadtest: build $(VENV)/.dev ## SECONDS=60 of Locust against a server of its own, or URL=ws://host/ws (ARGS="--users 3000")
	@$(RUN) -m loadtest.run --seconds $(or $(SECONDS),60) $(if $(URL),--url $(URL)) $(ARGS)

hostile: build $(VENV)/.dev ## hostile input against a running server, for two minutes; writes docs/hostile.md (ARGS="--only ping")
	@$(RUN) -m loadtest.hostile $(ARGS)

moves: build $(VENV)/.dev ## move connections under load, kill workers meanwhile, for ten minutes (ARGS="load churn")
	@$(RUN) -m loadtest.moves $(ARGS)

guard: build $(VENV)/.dev ## count the hot path's instructions under callgrind; fails if they are 3 % more than the baseline's
	@$(RUN) -m loadtest.guard $(ARGS)

guard-baseline: build $(VENV)/.dev ## make today's instructions the baseline, for this compiler and these versions
	@$(RUN) -m loadtest.guard --save $(ARGS)

conformance: build $(VENV)/.dev ## RFC 6455 by the Autobahn test suite, which needs a Python 2.7 (ARGS="--cases 6.4.*")
	@$(RUN) -m loadtest.conformance $(ARGS)

fuzz: build $(VENV)/.dev ## fuzz scanner, frames and mesh with sanitizers for SECONDS=60; findings: build/fuzz/findings
	@echo "fastsig: fuzzing for $(or $(SECONDS),60) s"
	@$(RUN) -m tests.fuzz --seconds $(or $(SECONDS),60) $(ARGS)

asan: build $(VENV)/.dev ## run the tests without sockets with AddressSanitizer and UBSan (ARGS="-k name")
	@echo "fastsig: building with AddressSanitizer and UBSan in build/asan"
	@mkdir -p build/asan && rm -rf build/asan/lib
	@FASTSIG_SANITIZE=address,undefined $(RUN) setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	@mkdir -p build/asan/lib/tests && cp pyproject.toml build/asan/lib
	@cp -r tests/__init__.py tests/conftest.py tests/unit tests/fuzz build/asan/lib/tests
	@cp -r docs README.md build/asan/lib
	@cd build/asan/lib && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    ../../../$(RUN) -m pytest --quiet -p no:cacheprovider -o timeout=300 \
	    $(addprefix --ignore=tests/unit/test_,bench.py conformance.py dashboards.py security.py) tests/unit $(ARGS)

soak: build $(VENV)/.dev ## load and faults for MINUTES=30: does anything grow? The plot: build/soak.svg
	@$(RUN) -m loadtest.soak --minutes $(MINUTES)

panels: build $(VENV)/.dev ## plot the dashboard's queries from a real Prometheus into docs/img/panels, for SECONDS=90 of load
	@$(RUN) -m loadtest.panels --seconds $(or $(SECONDS),90)

annotate: build ## write the page that shows what each line of the relay costs
	@FASTSIG_ANNOTATE=1 $(RUN) setup.py --quiet build_ext --build-lib build/annotate --build-temp build/annotate
	@echo "fastsig: see build/cython/fastsig/_relay.html"

coverage: build $(VENV)/.dev ## which lines of Python and Cython the unit tests run
	@echo "fastsig: building with traced lines in build/coverage"
	@rm -rf build/coverage && mkdir -p build/coverage/tests
	@cp -r fastsig pyproject.toml setup.py README.md SECURITY.md LICENSE docs deploy loadtest build/coverage
	@cp -r tests/__init__.py tests/conftest.py tests/unit tests/fuzz build/coverage/tests
	@mkdir build/coverage/tests/e2e && cp tests/e2e/*.py build/coverage/tests/e2e
	@rm -f build/coverage/fastsig/*.so build/coverage/fastsig/_relay.c
	@cd build/coverage && FASTSIG_COVERAGE=1 ../../$(RUN) setup.py --quiet build_ext --inplace
	@cd build/coverage && PYTHONPATH=. ../../$(RUN) -m coverage run -m pytest --quiet tests/unit $(ARGS)
	@cd build/coverage && ../../$(RUN) -m coverage report

wheel: $(VENV)/.dev ## build a wheel into dist/ and prove that it serves from an empty environment
	@echo "fastsig: building the wheel"
	@rm -rf build dist *.egg-info
	@$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@echo "fastsig: installing it into an empty environment and testing that"
	@empty=$$(mktemp -d) && trap 'rm -rf "$$empty"' EXIT && \
	    $(PYTHON) -m venv "$$empty/venv" && \
	    "$$empty/venv/bin/pip" -qq --disable-pip-version-check install dist/*.whl && \
	    FASTSIG_PYTHON="$$empty/venv/bin/python" $(RUN) -m pytest --quiet tests/e2e/test_clients.py -k "session_of or health"
	@ls dist/*.whl

clean: ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf fastsig/*.so fastsig/_relay.c fastsig/_relay.html $(NODE_TESTS)/node_modules
	find . -name __pycache__ -prune -exec rm -rf {} +

# ---- how they are made

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "fastsig: no Python 3.11 or newer ($(PYTHON)): apt-get install python3" >&2; exit 3; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "fastsig: no venv module: apt-get install python3-venv" >&2; exit 3; }
	@set -- $$($(PYTHON) -c 'import os, sysconfig; print(os.environ.get("CC") or sysconfig.get_config_var("CC"))'); \
	    command -v "$$1" >/dev/null || { echo "fastsig: no C compiler ($$1): apt-get install gcc" >&2; exit 3; }
	@test -e "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	    { echo "fastsig: no Python.h: apt-get install python3-dev" >&2; exit 3; }
	@echo "fastsig: making the environment $(VENV)"
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.flags
	@echo "fastsig: installing what it is built with and what it runs on"
	@$(RUN) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	    >$(VENV)/build-requirements.txt
	@$(PIP) install --requirement $(VENV)/build-requirements.txt
	@$(PIP) install --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "fastsig: installing what it is tested with"
	@$(PIP) install --no-build-isolation --editable '.[dev,e2e]'
	@touch $@

$(VENV)/.flags: force | $(VENV)/bin/python
	@echo '$(FLAGS)' | cmp -s - $@ || { rm -f fastsig/*.so; echo '$(FLAGS)' >$@; }

$(VENV)/.built: $(VENV)/.installed $(VENV)/.flags $(SOURCES)
	@echo "fastsig: building the extension"
	@$(RUN) setup.py --quiet build_ext --inplace
	@touch $@

# Without npm the tests that need node skip themselves and say so.
$(NODE_TESTS)/node_modules/.stamp: $(NODE_TESTS)/package.json $(NODE_TESTS)/package-lock.json
	@if command -v npm >/dev/null; then \
	    echo "fastsig: installing the node clients of the tests" && \
	    npm ci --prefix $(NODE_TESTS) --silent --no-audit --no-fund --ignore-scripts && touch $@; \
	else echo "fastsig: no npm, the tests with node clients will be skipped: apt-get install nodejs npm"; fi

force:
