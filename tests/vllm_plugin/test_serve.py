"""`vllm serve` with the plugin, as a user runs it: engine core and workers are processes of their own."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rowint8.eval.engines.server import free_port

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.vllm

START_SECONDS = 240
STOP_SECONDS = 15
VLLM = shutil.which("vllm", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """A running server of the real model, as (process, base URL, log file)."""
    port = free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    process = serve(smollm2, log, "--port", str(port), "--max-model-len", "256", "--enforce-eager")
    yield process, f"http://127.0.0.1:{port}/v1", log
    process.kill()


def serve(model: Path, log: Path, *options: str) -> subprocess.Popen:
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | quiet
    command = [VLLM, "serve", str(model), "--quantization", "rowint8", "--host", "127.0.0.1", *options]
    return subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)


def wait_until_healthy(process, client, log) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"not healthy after {START_SECONDS} s: {log.read_text()[-3000:]}")


@pytest.mark.newest
def test_a_completion_then_a_clean_stop(server):
    process, url, log = server
    client = openai.OpenAI(base_url=url, api_key="none")
    wait_until_healthy(process, client, log)
    (model,) = client.models.list().data
    completion = client.completions.create(
        model=model.id, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert completion.choices[0].text.startswith(" Paris")
    assert "quantization=rowint8" in log.read_text()
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "the engine core should be a process of its own"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=STOP_SECONDS) == 0
    _, alive = psutil.wait_procs(children, timeout=STOP_SECONDS)
    assert alive == []


def test_a_wrong_option_stops_the_server_with_one_clear_message(smollm2, tmp_path):
    options = '{"quantization_config": {"quant_method": "rowint8", "serialized": false, "skip": []}}'
    process = serve(smollm2, tmp_path / "log", "--port", str(free_port()), "--hf-overrides", options)
    assert process.wait(timeout=START_SECONDS) != 0
    assert "rowint8: unknown option skip; accepted are" in (tmp_path / "log").read_text()
