# Every target sets itself up: Python 3.11 or later, a C++ compiler and make are all it takes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

SOURCES := setup.py $(wildcard csrc/*.h csrc/*/*)
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

.PHONY: demo accuracy dorefa test test-keras bench gpu-check cuda-report docs wheel lint format build clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

# Trains a small network on real data with every quantizer and prints a table.
demo: $(VENV)/.installed-demo quantkernels/_C.so
	$(BIN)/python -m quantkernels.demo

# Compares the quantizers at four bit widths on two tasks; prints tables, draws docs/accuracy.png. It takes minutes.
accuracy: $(VENV)/.installed-examples quantkernels/_C.so
	$(BIN)/python examples/accuracy.py --output docs

# Trains the W/A/G grid of DoReFa-Net on scikit-learn's digits; prints a table, draws dorefa_digits.png.
dorefa: $(VENV)/.installed-examples quantkernels/_C.so
	$(BIN)/python examples/dorefa_digits.py

# Two processes: the emulator's tests in one, the rest in the other, take about as long.
TEST_PROCESSES ?= 2
KERAS_TESTS := tests/test_tensorflow.py tests/test_keras.py
PYTEST := $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile
test: $(VENV)/.installed-dev quantkernels/_C.so
	$(PYTEST) $(KERAS_TESTS:%=--ignore=%) $(PYTEST_ARGS)

# One Keras backend a process.
test-keras: $(VENV)/.installed-dev $(VENV)/.installed-keras quantkernels/_C.so
	KERAS_BACKEND=tensorflow TF_CPP_MIN_LOG_LEVEL=3 $(PYTEST) $(KERAS_TESTS)
	KERAS_BACKEND=torch TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python -m pytest -q tests/test_keras.py
	$(BIN)/python -m pytest -q tests/test_docs.py -k keras

# The documentation site, in build/site; warnings are errors. mkdocs calls a warning nothing where it is told to be quiet.
docs: $(VENV)/.installed-docs quantkernels/_C.so
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# In dist/: the wheel with the tag that auditwheel finds true, the sdist, what the building environment held, their SHA-256.
# The libraries of torch and TensorFlow are the user's. build/lib is made anew: setuptools leaves there what was deleted.
OTHERS_LIBRARIES := libtorch_cpu.so libc10.so libtensorflow_framework.so.2
wheel: $(VENV)/.installed-release quantkernels/_C.so
	rm -rf dist build/wheel build/lib*
	$(BIN)/python -m build --no-isolation --sdist --outdir dist
	$(BIN)/python -m build --no-isolation --wheel --outdir build/wheel
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --strip --wheel-dir dist \
	  $(addprefix --exclude ,$(OTHERS_LIBRARIES)) build/wheel/*.whl
	$(BIN)/python tools/try_wheel.py dist/*.whl
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-file dist/environment.cdx.json $(BIN)/python
	cd dist && sha256sum * > SHA256SUMS
	$(BIN)/auditwheel show dist/*.whl
	ls -l dist

# The quick mode takes a few minutes; `make bench BENCH_ARGS=` measures the full grid, which takes hours. By default glibc gives
# freed memory back, and every new page costs a fault: more than most operators.
BENCH_ARGS ?= --quick
bench: $(VENV)/.installed-bench quantkernels/_C.so
	THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864 \
	  $(BIN)/python -m benchmarks $(BENCH_ARGS)

# Registers, occupancy and 128-bit accesses of every CUDA kernel, as compiled; needs nvcc, no GPU.
cuda-report: $(VENV)/.installed-dev
	$(BIN)/python tools/cuda_report.py

# Tests, sanitizers and benchmarks on a GPU, within ten minutes; GPU_CHECK_DEVICE=cpu is a dry run. Installs nothing: it
# takes the virtual environment if there is one, else $(PYTHON), which must have torch and pytest.
gpu-check:
	PYTHON=$(firstword $(wildcard $(abspath $(BIN)/python)) $(PYTHON)) bash tools/gpu_check.sh

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

build: $(VENV)/.installed-dev quantkernels/_C.so

clean:
	rm -rf build dist *.egg-info quantkernels/_C.so quantkernels/_tensorflow.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

# An extra of pyproject.toml and the library. torch and ninja come first: the build needs them, and an isolated build
# would download a torch of its own.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch ninja 'setuptools>=77'
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[$*]'
	touch $@

# The rule runs after an .installed-% rule, which every target that needs the library names first.
quantkernels/_C.so: $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
