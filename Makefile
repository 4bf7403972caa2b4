.PHONY: demo test setup lint

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
