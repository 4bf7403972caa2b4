"""Shared fixtures. Without a GPU, Triton kernels run under its interpreter, which must be chosen before import."""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job of a shell, and then all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parents[1]


SLOW = (
    "vllm_plugin/",
    "kernels/test_compilation",
    "eval/quality/test_",
    "eval/engines/test_vllm",
    "baseline_engine/test_engine",
    "baseline_engine/test_c",
    "test_notebook",
    "test_install",
)
"""How names of files below tests/ begin that take half a minute or more. They come first: no process is left alone with
one at the end."""


def pytest_addoption(parser):
    parser.addoption("--every-kernel", action="store_true", help="compile every variant of every kernel (some minutes)")


def pytest_collection_modifyitems(items):
    tests = REPO / "tests"
    items.sort(key=lambda item: not item.path.relative_to(tests).as_posix().startswith(SLOW))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real SmolLM2-135M-Instruct that `make setup` converts."""
    folder = REPO / "models" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        pytest.skip("models/smollm2-135m-instruct is missing; `make setup` makes it")
    return folder


@pytest.fixture
def device() -> str:
    """Where kernels run in this session: compiled on the GPU, or interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def assert_matches():
    """Compares an operator's output with its fp64 oracle, within a bound that follows from the arithmetic.

    `rounded` are the quantities that are rounded to the output's dtype on the way (the output among them), each off by
    at most `half_ulp`. `magnitude` is the oracle on the absolute values of the inputs: errors of summing in fp32 are
    relative to it, because what cancels leaves its error behind.
    """

    def check(out, exact, magnitude, *rounded, half_ulp=None):
        assert out.shape == exact.shape
        half_ulp = torch.finfo(out.dtype).eps / 2 if half_ulp is None else half_ulp
        subnormal_step = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
        error = (out.double() - exact).norm()
        allowed = half_ulp * sum(part.norm() for part in (exact, *rounded))
        allowed += 2e-6 * magnitude.norm() + subnormal_step * exact.numel() ** 0.5
        assert error <= allowed, f"error {error:.2e} exceeds {allowed:.2e}; the output's norm is {exact.norm():.2e}"

    return check


@pytest.fixture
def poison_empty(monkeypatch):
    """Makes `torch.empty` return NaN (floating) so that an element a kernel does not write fails the test."""
    plain = torch.empty

    def poisoned(*args, **kwargs):
        out = plain(*args, **kwargs)
        if out.is_floating_point():
            out.detach().fill_(float("nan"))
        return out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A process that runs real vLLM engines, for all files: it takes ten seconds to start."""
    from tests.vllm_plugin.harness import Driver

    driver = Driver(tmp_path_factory.mktemp("driver") / "log")
    yield driver
    driver.stop()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """Folder of a random model that vLLM loads in no time."""
    from tests.vllm_plugin.harness import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def online(driver, tiny) -> dict:
    """What vLLM says with `tiny`, quantized while loading."""
    return driver.works(tiny)
