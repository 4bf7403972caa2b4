"""The C file `cpu_int8.c`, built once for each kind of CPU by the machine's C compiler and kept in ~/.cache/rowint8.

It takes about a second. Without a compiler the operators run in plain torch: the same bits, later.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("cpu_int8.c")
_FLAGS = "-O3 -shared -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math"
_BY_CPU = {
    "AVX2": "-mavx2 -mfma",
    "AVX512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}
"""Flags for what torch says this CPU has (`torch.backends.cpu.get_cpu_capability`)."""
_SECONDS = 120
_AT, _FLAG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = {
    "quantize_tokens": (_AT, _FLAG, *[_SIZE] * 3, *[ctypes.c_float] * 2, *[_AT] * 3, _FLAG),
    "scale_sums": (*[_AT] * 4, *[_SIZE] * 2, _AT, _FLAG, _FLAG),
    "swiglu_sums": (*[_AT] * 3, *[_SIZE] * 2, _AT, _FLAG, _FLAG),
}
"""Argument types of the functions in the C file, which return nothing."""


@cache
def library() -> ctypes.CDLL | None:
    """The functions of the C file; None, with one warning, where they cannot be built."""
    try:
        built = ctypes.CDLL(str(_built()))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(built, name)
            function.argtypes, function.restype = arguments, None
        return built
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().split("\n")[0]
        logging.getLogger(__name__).warning(
            "rowint8: INT8 activations run in plain torch, which is slower, for no C compiler built them: %s", reason
        )
        return None


def _built() -> Path:
    """The shared library, made unless it is there. It appears whole or not at all."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise RuntimeError("no cc, gcc or clang is there; install one, or name it in CC")
    command = [*compiler.split(), *_FLAGS.split(), *_BY_CPU.get(torch.backends.cpu.get_cpu_capability(), "").split()]
    key = hashlib.sha256(_SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rowint8"
    path = folder / f"cpu_int8-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            run = subprocess.run(
                [*command, str(_SOURCE), "-o", str(made), "-lm"], capture_output=True, text=True, timeout=_SECONDS
            )
            if run.returncode:
                raise RuntimeError(run.stderr)
            made.replace(path)
    return path
