# `make demo`, `make test` and most other targets first set up a virtual environment, in which motet
# is built and installed. PYTHON selects its interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.?pp csrc/*/*.?pp)
RESULTS ?= $(or $(MOTET_RESULTS),benchmarks/results)

.PHONY: demo test test-slow test-all test-cpus coverage lint docs docs-links bench claims results cost-growth gpu \
	gpu-check gpu-profile gpu-full gpu-install soak sanitize clean

$(INSTALLED): setup.py pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
ifeq ($(shell uname -s),Linux)
# Without its dependencies, which are gigabytes of CUDA libraries.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps cucim-cu13
endif
	touch $@

demo: $(INSTALLED)
	$(BIN)/motet demo --out runs/demo

# One thread per test process: two workers on two cores do not fight over them. A worker that has
# nothing left to do takes tests from another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

# What to run after a change: about four minutes on two cores, once installed. Every documented
# behaviour is tested at least once.
test: $(INSTALLED)
	$(PYTEST) -m "not slow"

# The rest: builds, compilation ahead of time, simulations, kills, every case of large tests.
test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-all: test test-slow

# Lines of the package that `make test` runs in its own processes, and that all tests run.
coverage: $(INSTALLED)
	$(BIN)/pip install --quiet pytest-cov
	$(PYTEST) -m "not slow" --cov motet --cov-report term:skip-covered
	$(PYTEST) -m slow --cov motet --cov-append --cov-report term:skip-covered

# The numeric tests, computed as on two other processors: one with AVX2 but without AVX-512 (most AMD
# EPYCs), and one with neither. These variables decide which code torch, MKL, oneDNN, OpenBLAS and
# our C++ run. Each processor has its own cache of compiled code, because torch's compiler ignores
# ATEN_CPU_CAPABILITY when it looks code up.
AVX2 := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
	OPENBLAS_CORETYPE=Haswell MOTET_SIMD=32 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2
SSE := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
	OPENBLAS_CORETYPE=Prescott MOTET_SIMD=16 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-sse
NUMERIC := $(addprefix python_tests/test_,$(addsuffix .py,absorbed_attention attention_engine \
	context_kv healnet harmonic_merge latent_attention lego lego_engine one_token resample slerp smooth \
	stain_planes triton_context_kv triton_kernels triton_kv_records triton_lego_pass triton_operators))
NUMBERS := "not compile and not registration and not memory and not fuzz"
test-cpus: $(INSTALLED)
	$(AVX2) $(PYTEST) -m "not slow" -k $(NUMBERS) $(NUMERIC)
	$(SSE) $(PYTEST) -m "not slow" -k $(NUMBERS) $(NUMERIC)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/basedpyright
	MOTET_REQUIRE_NATIVE=1 CMAKE_ARGS=-DCMAKE_COMPILE_WARNING_AS_ERROR=ON $(BIN)/pip wheel --quiet --no-deps --wheel-dir build/lint .

# The site, in build/docs; a warning, such as a link to nothing, is an error. NOTEBOOKS=off does not
# execute the notebooks. The packages that build it are installed here, so that tests need none of
# them, and by name, so that the C++ is not built again.
DOCS := $(VENV)/.installed-docs
REQUIRED := import tomllib; f = open("pyproject.toml", "rb"); \
	print(*tomllib.load(f)["project"]["optional-dependencies"]["docs"])
$(DOCS): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt $$($(BIN)/python -c '$(REQUIRED)')
	touch $@
docs: $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -b html -W --keep-going --quiet \
	$(if $(filter off,$(NOTEBOOKS)),-D nb_execution_mode=off -D suppress_warnings=myst-nb.lexer) docs build/docs
docs-links: $(DOCS)  # needs the network
	$(BIN)/python -m sphinx -b linkcheck --quiet -D nb_execution_mode=off \
	-D suppress_warnings=myst-nb.lexer docs build/docs-links

# The quick benchmarks; every time has its error beside it.
bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks --benchmark-columns=min,median,stddev,rounds --benchmark-group-by=group

# How the cost of a training step grows with patches and modalities: measured on this CPU, predicted
# for an H200 (three minutes).
cost-growth: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cost_growth.py

# Test the paper's claims (docs/claims.md) on the cohorts whose data are on this machine: about an
# hour. If it was interrupted, the same command continues it.
claims: $(INSTALLED)
	for name in interference merging overlap addition scaling; do \
	$(BIN)/python -m benchmarks.claims $$name --out runs/claims/$$name || exit; \
	done

# Make docs/results.md anew: every cohort whose data are on this machine, with all models, two at a
# time. If it was interrupted, the same command continues it; to repeat finished runs, remove
# runs/results. ONLY=COHORT runs one cohort and prints its tables; JOBS=N runs N commands at a time.
results: $(INSTALLED)
	$(BIN)/python -m benchmarks.results $(if $(ONLY),--only $(ONLY)) $(if $(JOBS),--jobs $(JOBS))

# On the GPU of this machine. The targets do not depend on each other, and each writes a JSON file to
# $(RESULTS):
#   gpu-check    all checks (under 90 s)
#   gpu-profile  the kernels of a training step (60 s); it fails if one of them is slower than
#                demanded, or than with another Triton
#   gpu          40 cells (200 s)
#   gpu-full     all cells, for 500 s; the same command again continues
# They use the active environment, since GPU machines bring their own torch.
# PUBLISHED=DIR, a clone of konst-int-i/healnet, adds the authors' code.
GPU = $(PYTHON) benchmarks/gpu.py $(1) --out $(RESULTS) $(if $(PUBLISHED),--published $(PUBLISHED))
gpu-check: gpu-install
	$(call GPU,check)
gpu-profile: gpu-install
	$(call GPU,profile)
gpu: gpu-install
	$(call GPU,cells)
gpu-full: gpu-install
	$(call GPU,full)
gpu-install:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .

# All tests: the property tests (hypothesis) with new seeds and many more examples, and everything that CI samples.
soak: $(INSTALLED)
	MOTET_HYPOTHESIS=soak $(PYTEST)

# The tests of the C++ under AddressSanitizer and UndefinedBehaviorSanitizer, which stop at the first
# fault.
SANITIZED := build/sanitize
sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)
	MOTET_REQUIRE_NATIVE=1 CMAKE_ARGS="-DMOTET_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo" $(BIN)/pip wheel --quiet --no-deps --wheel-dir $(SANITIZED) .
	$(BIN)/python -m zipfile -e $(SANITIZED)/motet-*.whl $(SANITIZED)
	PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -p no:cacheprovider -k "not registration and not gradients" \
	$(addprefix python_tests/test_,$(addsuffix .py,bindings_fuzz harmonic_merge slerp context_kv one_token resample smooth stain_planes jpeg_tiles))

clean:
	rm -rf $(VENV) build dist runs *.egg-info kernels/_C.* io/_C.*
