"""A small engine that a student can read in an evening: paged, continuously batching, in bf16 or over INT8 operators.

    from rowint8.baseline_engine import Engine, EngineConfig, SamplingParams

Read it in this order; a request passes through the files the same way (docs/engine.md walks one through):

    engine        `Engine.generate`, and `Engine.step`, which is the whole story: schedule, launch, record
    request       one prompt on its way to becoming a completion
    prompts       text, token ids or messages, checked
    tokenizer     text to token ids and back, piece by piece; stop strings
    scheduler     which tokens of which requests are computed next
    block_pool    which blocks of the KV cache are free, whose they are, and what can be shared
    runner        a step's tokens through the model, or through a CUDA graph, to sampled tokens
    batch         the step's tokens as tensors, without padding
    graphs        steps as CUDA graphs: of decoding, and with prompts
    model         the decoder: embedding, layers, norm, logits
    layers        linear layers (plain and INT8), norms, rotary positions, SwiGLU
    experts       a mixture of experts in place of the SwiGLU
    attention     which library computes attention over the paged cache, and how it is asked
    kv_cache      the memory behind the blocks
    sampler       logits to the next token
    metrics       what TTFT, ITL, TPOT, tok/s and the rest mean, defined once

and, once at the start:

    startup       load, choose, measure memory, compile, capture
    config        what the user asks for: of the engine, and for each request
    config_file   what a config.json may say, with the defaults of each family
    model_config  the decoder's shape and constants, read from it
    checkpoint    safetensors into the model, quantized on the way

Besides: errors, files (reading a model folder), progress (a bar), transfer (lists to the device) and scoring (how
likely the model finds a given text). `extras/` is not part of the evening: the command `baseline-generate`, and an
engine for coroutines.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rowint8.baseline_engine.config import EngineConfig, SamplingParams
    from rowint8.baseline_engine.engine import Engine

__all__ = ["Engine", "EngineConfig", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and nothing before: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'engine' if name == 'Engine' else 'config'}"), name)
