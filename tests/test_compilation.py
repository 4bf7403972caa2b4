"""The Hopper kernel compiles without a GPU, within the card's shared memory and without spilling registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_MEMORY = 232_448


def test_hopper_kernels_compile_without_spills(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_hopper.py")
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["name"] for report in reports] == [
        "linear: hopper_kernel",
        "split: hopper_kernel",
        "split: _add_parts",
        "swiglu: hopper_kernel",
    ]
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY, report
        assert report["stack"] == report["local"] == 0, report
