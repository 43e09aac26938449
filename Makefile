# make demo    the main job on real photographs, into demo-output/
# make test    the whole test suite (PYTEST_ARGS=--cov: with the branch coverage of both packages, in a seventh more time)
# make lint    format, lint, types
# make sanitize the C++ tests under ASan and UBSan (SANITIZE=thread: TSan)
# make clang   the same by Clang, as a shared library (CLANG=clang++-19 names another)
# make bench   every benchmark whose results are committed, about half an hour; goes on where it was stopped; the README's digest
# make cross-aarch64, cross-baseline  the C++ core and its tests for aarch64, and for the oldest x86-64, under QEMU
# make bench-compare BASE=main  HEAD against another commit, built and measured by turns; fails where it is slower
# make install the package alone, into .venv
# make clean   everything that the above made
#
# PYTHON chooses the interpreter (3.10 or newer), VENV the environment, PYTEST_ARGS adds to pytest's command line,
# WORKERS says how many processes run the tests. INSTALLER=uv installs with uv: seconds instead of minutes, but what pip is
# configured to do uv does not read. BENCH_ARGS adds to `ttt4as bench all`, COMPARE_ARGS to bench-compare: for a
# look, not for a verdict, COMPARE_ARGS="--rounds 2 --seconds 0.1".
# A rerun installs again only what changed.

PYTHON ?= python3
VENV ?= .venv
SANITIZE ?= address,undefined
CLANG ?= clang++
PYTEST_ARGS ?=
WORKERS ?= 2
INSTALLER ?= pip
BASE ?= HEAD~1
BENCH_ARGS ?=
COMPARE_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL_pip := $(PIP) install
INSTALL_uv := $(BIN)/uv pip install --python $(BIN)/python
INSTALL = $(or $(INSTALL_$(INSTALLER)),$(error INSTALLER: expected pip or uv, got $(INSTALLER)))
# The sources of this folder, anew whatever was made of them before.
INSTALL_HERE = $(INSTALL) $(if $(filter uv,$(INSTALLER)),--reinstall-package ttt4as_fast)
INSTALLED_BY = $(BIN)/$(if $(filter uv,$(INSTALLER)),uv,python)
SOURCES := pyproject.toml setup.py CMakeLists.txt MANIFEST.in \
	$(shell find ttt4as_fast kernels benchmarks -type f ! -name '*.py[co]' ! -name '*.so')
# The same names as in .pre-commit-config.yaml.
CPP_FILES = $(shell find kernels tests $(wildcard benchmarks examples) -type f | \
	grep -E '\.(c|h|cpp|hpp|inl|cu|cuh)$$')

.PHONY: demo test lint typecheck sanitize clang cross-aarch64 cross-baseline bench bench-compare install clean

demo: $(VENV)/.installed
	$(BIN)/ttt4as demo --output demo-output

# The workers share the processors: an OpenMP thread that waits must sleep. Spinning took three times the CPU. Files in the
# order of their names: xdist's own, by the number of tests, leaves the builds to the end, where one worker waits.
test: $(VENV)/.installed-test
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) typecheck
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run --Werror $(CPP_FILES))

sanitize: $(VENV)/.installed-test
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DTTT4AS_BUILD_TESTS=ON -DTTT4AS_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure -j 2

# Another compiler sees what GCC lets through, and what a shared library does not export does not link.
clang: $(VENV)/.installed-test
	$(BIN)/cmake -S . -B build/clang -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DCMAKE_CXX_COMPILER=$(CLANG) -DBUILD_SHARED_LIBS=ON \
		-DTTT4AS_BUILD_TESTS=ON -DTTT4AS_SANITIZE=$(SANITIZE)
	$(BIN)/cmake --build build/clang
	$(BIN)/ctest --test-dir build/clang --output-on-failure -j 2

# The core on processors that are not at hand: a cross compiler and QEMU's user mode (Debian: g++-aarch64-linux-gnu,
# qemu-user). kvm64 has SSE3 and nothing later: an instruction of a newer set outside the dispatched files ends a test.
CROSS = $(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
	-DTTT4AS_BUILD_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux
cross-aarch64: $(VENV)/.installed-test
	$(CROSS) -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		"-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu"
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure -j 2

cross-baseline: $(VENV)/.installed-test
	$(CROSS) -DCMAKE_SYSTEM_PROCESSOR=x86_64 "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-x86_64;-cpu;kvm64"
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure -j 2

# mypy sees the layout that is installed: kernels/ as ttt4as_fast/kernels/.
typecheck: $(VENV)/.installed-dev
	rm -rf build/typing && mkdir -p build/typing
	cp -Rp ttt4as_fast build/typing/ && cp -Rp kernels build/typing/ttt4as_fast/kernels
	cd build/typing && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache ttt4as_fast

bench: $(VENV)/.installed-bench
	$(BIN)/ttt4as bench all --output benchmarks/results $(BENCH_ARGS)
	$(BIN)/ttt4as bench --report build/bench-report --output benchmarks/results --readme README.md

# -I: in the root of a checkout, `ttt4as_fast` would be the folder and not the installed package.
bench-compare: $(VENV)/.installed-bench
	$(BIN)/python -I -m ttt4as_fast.benchmarks.compare $(BASE) $(COMPARE_ARGS)

install: $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info demo-output .coverage .coverage.* \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(BIN)/uv: | $(BIN)/python
	$(PIP) install uv

# setuptools packs whatever an earlier build left in build/lib*, files that are gone since among it.
$(VENV)/.installed: $(SOURCES) | $(INSTALLED_BY)
	rm -rf build/lib build/lib.* build/bdist.*
	$(INSTALL_HERE) .
	touch $@

$(VENV)/.installed-test: $(SOURCES) | $(INSTALLED_BY)
	rm -rf build/lib build/lib.* build/bdist.*
	$(INSTALL_HERE) ".[test]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-bench: $(SOURCES) | $(INSTALLED_BY)
	rm -rf build/lib build/lib.* build/bdist.*
	$(INSTALL_HERE) ".[bench]"
	touch $(VENV)/.installed $@

# The linters read the sources, not the installation: that it is stale does no harm, that its list of extras is would.
$(VENV)/.installed-dev: pyproject.toml | $(INSTALLED_BY)
	test $(VENV)/.installed -nt pyproject.toml || $(MAKE) $(VENV)/.installed
	$(INSTALL) "ttt4as_fast[dev]"
	touch $@
