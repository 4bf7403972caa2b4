"""What the user asks for, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rowint8.baseline_engine.errors import SettingError
from rowint8.baseline_engine.model_config import DTYPES, ModelConfig

PROMPT_SIZES = (32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
"""Numbers of tokens for which steps with prompts are captured, as far as `prompt_graph_tokens` allows."""


@dataclass(frozen=True)
class EngineConfig:
    """What to load and how to run it."""

    model: str
    """A local folder, or a hub name."""
    quantization: Literal["none", "rowint8"] = "none"
    """rowint8: linear weights as INT8 rows. A checkpoint that holds INT8 already needs no flag."""
    fused: bool | None = None
    """One operator for gate, up, SiLU and product. None: with rowint8 wherever the MLP has no bias."""
    int8_lm_head: bool = False
    """With rowint8: the output layer too, and with it the embedding where the two are one tensor."""
    mode: Literal["eager", "compile", "graph"] = "eager"
    """compile: `torch.compile` of the decoder layer, shared by all layers. graph: compiled, and decode steps replayed
    as CUDA graphs; needs a GPU."""
    prompt_graph_tokens: int = 1024
    """With mode graph: most tokens of a step with prompts that is replayed as a CUDA graph, where attention can be
    (FlashAttention 3). 0 leaves prompts to launches one by one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of activations and unquantized weights; auto is the checkpoint's."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu or cuda. CUDA_VISIBLE_DEVICES chooses among several GPUs."""
    max_seqs: int = 256
    """Most requests that run at the same time."""
    max_batch_tokens: int = 8192
    """Most tokens that one step computes; longer prompts are prefilled in pieces."""
    max_context: int | None = None
    """Most tokens of a prompt and its output. None: as many as the model and the cache take."""
    cache_tokens: int | None = None
    """Tokens that the KV cache holds. None: on CUDA what memory_fraction leaves, on the CPU 16384."""
    memory_fraction: float = 0.9
    """Of the GPU's memory, for weights, activations and KV cache together."""
    block_size: int = 16
    """Tokens in a block of the KV cache."""
    prefix_caching: bool = True
    """Share the blocks of common beginnings between requests."""
    overlap: bool | None = None
    """Prepare and queue a step before the tokens of the one before have reached the host. None: on CUDA."""

    def __post_init__(self) -> None:
        _check_choice("quantization", self.quantization, ("none", "rowint8"))
        _check_choice("mode", self.mode, ("eager", "compile", "graph"))
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        _check_choice("dtype", self.dtype, ("auto", *DTYPES))
        for name in ("max_seqs", "max_batch_tokens", "block_size"):
            _check_positive(name, getattr(self, name))
        for name in ("max_context", "cache_tokens"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        least, *_, most = PROMPT_SIZES
        if self.prompt_graph_tokens and not least <= self.prompt_graph_tokens <= most:
            given = f"prompt_graph_tokens is {self.prompt_graph_tokens}"
            raise SettingError(f"{given}; accepted are 0 and {least} to {most}")
        if not 0 < self.memory_fraction <= 1:
            raise SettingError(f"memory_fraction is {self.memory_fraction}; accepted is above 0 and up to 1")

    def torch_dtype(self, model: ModelConfig) -> torch.dtype:
        return model.dtype if self.dtype == "auto" else DTYPES[self.dtype]

    def torch_device(self) -> torch.device:
        """Raises SettingError where this machine has no such device, or the device cannot do what the mode asks."""
        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            raise SettingError("device is 'cuda'; torch finds no CUDA GPU here")
        device = torch.device("cpu" if self.device == "cpu" or not found else "cuda")
        if self.mode == "graph" and device.type != "cuda":
            raise SettingError("mode is 'graph', which needs a CUDA GPU; accepted here are eager and compile")
        return device


def _check_positive(name: str, given: int) -> None:
    if given < 1:
        raise SettingError(f"{name} is {given}; accepted is 1 or more")


def _check_choice(name: str, given: str, accepted: Sequence[str]) -> None:
    if given not in accepted:
        raise SettingError(f"{name} is {given!r}; accepted are {', '.join(accepted)}")
