.PHONY: demo test setup lint sanitize

demo: setup
	.venv/bin/rowint8 demo

test: setup
	.venv/bin/python -m pytest

setup:
	@scripts/setup.sh

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# on a machine with a CUDA GPU and compute-sanitizer in PATH
sanitize: setup
	compute-sanitizer --tool memcheck --error-exitcode 1 .venv/bin/python scripts/run_each_kernel.py
	compute-sanitizer --tool racecheck --error-exitcode 1 .venv/bin/python scripts/run_each_kernel.py
