# One-liners. `setup` makes .venv; every other target depends on it.
PYTHON ?= python3.11
# An index that offers a CPU build of torch keeps gigabytes of CUDA off a CPU-only machine,
# e.g. TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=
BIN := .venv/bin

.PHONY: setup demo test test-unit test-gpu test-chaos test-smoke test-hosts check bench
setup: .venv/.installed
demo: setup ; $(BIN)/heliostat up gpt-demo
check: setup ; $(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy
test: test-unit ; $(BIN)/pytest -m 'not chaos' tests/local_cluster
# Two at once; a file's tests stay together, since they share what they build.
test-unit: setup ; $(BIN)/pytest -n 2 --dist loadfile -m 'not chaos' tests/unit
# Says so where there is no GPU.
test-gpu: setup ; $(BIN)/pytest -v tests/gpu
test-chaos: setup ; $(BIN)/pytest -m chaos tests
# Both need root, and apt-get install iproute2 openssh-server rsync; they say what is missing. `test`
# has the first in it, where the machine can.
test-smoke: setup ; $(BIN)/pytest -v tests/local_cluster/test_hosts.py
test-hosts: setup ; $(BIN)/pytest -v -s --durations=0 --timeout=1800 tests/hosts
bench: setup ; $(BIN)/python benchmarks/main_job.py

# torch goes first and alone, so that the build that pip is set up to offer is the one taken.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
