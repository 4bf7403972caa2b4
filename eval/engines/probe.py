"""What the benchmarks ask of vLLM's worker processes: their memory, and what they compile while requests run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rowint8.baseline_engine.metrics import PeakMemory


class Compilations:
    """Names of what this process compiled since the last `read`.

    Triton reports every kernel that it compiles or takes from its disk cache, Inductor's and Gluon's among them: both
    count, for on a fresh machine both are compiled. torch.compile counts the graphs that it traced; they have no names.
    Kernels that others build (Humming with nvcc) are not seen.
    """

    def __init__(self) -> None:
        from triton import knobs

        self._names: list[str] = []
        self._graphs = _traced_graphs()
        knobs.compilation.listener = self._listener(knobs.compilation.listener)

    def _listener(self, other: Callable | None) -> Callable:
        def listen(**event: Any) -> None:
            self._names.append(str(getattr(event.get("src"), "name", "unnamed")))
            if other is not None:
                other(**event)

        return listen

    def read(self) -> list[str]:
        """Kernels in order, then "torch.compile graph" for each traced graph."""
        graphs = _traced_graphs()
        names = self._names + ["torch.compile graph"] * (graphs - self._graphs)
        self._names, self._graphs = [], graphs
        return names


def _traced_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class Probe:
    """Methods that vLLM mixes into its worker class (`worker_extension_cls`), on every rank. Bytes throughout."""

    model_runner: Any
    device: torch.device
    get_model: Callable[[], nn.Module]

    def rowint8_watch(self) -> None:
        """Begins to note compilations and peak memory."""
        self._rowint8_compilations = Compilations()
        self._rowint8_peak = PeakMemory(self.device)
        self._rowint8_peak.reset()

    def rowint8_read(self) -> dict[str, Any]:
        """{"weights", "peak_mem", "compiled"}, the last two since the call before; begins anew.

        peak_mem: on CUDA what torch had allocated at most, less the KV cache, which fills the card whatever the model;
        on the CPU the process's resident set.
        """
        peak = self._rowint8_peak.read()
        if self.device.type == "cuda":
            peak -= storage_bytes(tree_leaves(self.model_runner.kv_caches))
        self._rowint8_peak.reset()
        return {
            "weights": weight_bytes(self.get_model()),
            "peak_mem": peak,
            "compiled": self._rowint8_compilations.read(),
        }


def probed_llm(arguments: Mapping[str, Any]) -> Any:
    """`vllm.LLM` with a Probe on every rank, which watches from here on: `collective_rpc("rowint8_read")` asks it.

    It caches no prefixes and has no tokenizer.
    """
    from vllm import LLM

    probe = f"{Probe.__module__}.{Probe.__qualname__}"
    llm = LLM(**arguments, worker_extension_cls=probe, enable_prefix_caching=False, skip_tokenizer_init=True)
    llm.collective_rpc("rowint8_watch")
    return llm


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, shared ones once; without tables made at every start (RoPE)."""
    return storage_bytes(model.state_dict(keep_vars=True).values())


def storage_bytes(values: Any) -> int:
    """Bytes of the memory behind the tensors among `values`, each piece once."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
