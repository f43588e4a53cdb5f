# Every target sets up .venv by itself; nothing else needs to be installed but Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-gpu test-versions check bench clean

demo: $(READY)
	$(BIN)/gift demo --output demo-output --overwrite

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

# With the Python there is (PYTHON=...) and what it has installed; red when anything fails.
test-gpu:
	rm -rf gpu-test-output
	$(PYTHON) -m benchmarks.gpu_suite --parts warm,tests,accuracy --budget-minutes 4 \
		--output gpu-test-output

# With older and newer versions of PyTorch and Transformers; hours, and gigabytes of downloads.
test-versions: $(READY)
	$(BIN)/python tests/versions.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(READY)
	$(BIN)/python -m benchmarks --output bench-output --overwrite

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch and the other packages are downloaded, some gigabytes;"
	@echo "one to three minutes on a fast connection. pip says what it installs:"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) demo-output bench-output gpu-test-output
