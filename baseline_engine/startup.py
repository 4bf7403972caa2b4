"""What happens once, before the first request: load, choose, measure memory, compile, capture."""

from time import perf_counter
from typing import Any

import psutil
import torch
from torch.fx.experimental import _config as fx_config

from rowint8.baseline_engine import attention
from rowint8.baseline_engine.checkpoint import load_model, resolve_folder
from rowint8.baseline_engine.config import PROMPT_SIZES, EngineConfig
from rowint8.baseline_engine.errors import EngineError, SettingError
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.layers import Int8Linear, WeightFormat
from rowint8.baseline_engine.model import Decoder
from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.baseline_engine.runner import ModelRunner
from rowint8.baseline_engine.tokenizer import Tokenizer, has_tokenizer

CPU_CACHE_TOKENS = 16384
GRAPH_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 257, 16))
"""Numbers of sequences for which decode graphs are captured, as far as `max_seqs` allows."""
_MOST_SLOTS = 2**31
"""Cache slots are numbered in int32."""
_MAX_COMPILED = 64
"""Compiled graphs of a decoder layer kept in one process (torch's own limit is 8)."""


def load(config: EngineConfig, progress: bool) -> tuple[Decoder, Tokenizer | None]:
    """The model of a folder, and its tokenizer where it has one."""
    device = config.torch_device()
    folder = resolve_folder(config.model)
    model_config = ModelConfig.from_folder(folder)
    weights = weight_format(config, model_config, device)
    try:
        model = load_model(folder, model_config, weights, progress=progress)
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"{folder} does not fit into the memory of {device}; quantization rowint8 halves it"
        ) from error
    return model, Tokenizer(folder) if has_tokenizer(folder) else None


def weight_format(config: EngineConfig, model: ModelConfig, device: torch.device) -> WeightFormat:
    """How the weights are held; raises EngineError where the settings contradict each other or the model."""
    int8 = config.quantization == "rowint8" or model.int8_checkpoint
    if not int8 and (config.fused or config.int8_lm_head):
        what = "fused SwiGLU is an INT8 operator" if config.fused else "int8_lm_head is part of rowint8"
        raise SettingError(f"{what}; give quantization rowint8 with it")
    if config.fused and model.mlp_bias:
        raise EngineError("this model's MLP has a bias, which the fused SwiGLU has not; give --no-fused")
    fused = int8 and not model.mlp_bias if config.fused is None else config.fused
    return WeightFormat(config.torch_dtype(model), device, int8, fused, config.int8_lm_head)


def make_runner(model: Decoder, config: EngineConfig) -> tuple[ModelRunner, float]:
    """A runner whose cache fills the memory that it may take, and the seconds spent on compiling and capturing.

    No kernel and no graph of the model is compiled after this.

    Raises:
        EngineError: memory suffices for no cache, or not for the context asked for.
    """
    weights, size, mode = model.weight_format, config.block_size, config.mode_on(model.weight_format.device)
    backend = attention.choose(model.config, weights.dtype, weights.device, size)
    most = min(config.max_context or model.config.max_position_embeddings, model.config.max_position_embeddings)
    warmed = _warm_up(model, config) if weights.int8 and weights.device.type == "cuda" else 0.0
    start = perf_counter()
    if mode != "eager":
        model.compile_layers()
    # Without duck shapes, sizes that happen to be equal at the start may differ later: nothing is compiled again.
    no_duck_shapes: Any = fx_config
    with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED), no_duck_shapes.patch(use_duck_shape=False):
        probe = ModelRunner(model, _cache(model, 2, size), backend, 1, most)
        _compile(probe, mode)
        tokens = config.cache_tokens or _tokens_that_fit(model, config, probe)
        context = min(most, tokens)
        if config.max_context and context < config.max_context:
            raise EngineError(
                f"max_context is {config.max_context}; the model and the KV cache take up to {context} tokens"
            )
        runner = ModelRunner(model, _cache(model, -(-tokens // size) + 1, size), backend, config.max_seqs, context)
        _compile(runner, mode)  # again: a cache this large may need wider addresses
        if mode == "graph":
            _capture(runner, config)
    return runner, warmed + (perf_counter() - start if mode != "eager" else 0.0)


def _compile(runner: ModelRunner, mode: str) -> None:
    if mode != "eager":
        for num_tokens in (1, 2):
            runner.run_empty(num_tokens)


def _warm_up(model: Decoder, config: EngineConfig) -> float:
    """Compiles every INT8 kernel that a step may launch, whatever its number of tokens; the seconds it took."""
    from rowint8.kernels.warmup import WeightShape, warmup

    layer: Any = model.layers[0]  # all are alike
    products: Any = [("linear", layer.attention.qkv), ("linear", layer.attention.o), ("linear", layer.mlp.down)]
    products += [("swiglu" if layer.mlp.fused else "linear", layer.mlp.gate_up)]
    calls = [WeightShape(op, *part.values.shape, has_bias=part.bias is not None) for op, part in products]
    if layer.post_norm.fused:
        calls.append(WeightShape("add_rms_norm", model.config.hidden_size, model.config.hidden_size))
    needed = [(calls, config.max_batch_tokens)]
    if isinstance(model.lm_head, Int8Linear):
        n, k = model.lm_head.values.shape
        needed.append(([WeightShape("linear", n, k)], config.max_seqs))
    try:
        return sum(
            warmup(each, model.weight_format.dtype, model.weight_format.device, most).seconds for each, most in needed
        )
    except ValueError as error:  # a damaged file of tiles, or a card that no kernel is for
        raise EngineError(str(error)) from error


def _cache(model: Decoder, num_blocks: int, block_size: int) -> KvCache:
    tokens, weights = num_blocks * block_size, model.weight_format
    advice = f"no memory for a KV cache of {tokens} tokens; give fewer with cache_tokens"
    needed = tokens * KvCache.bytes_per_token(model.config, weights.dtype)
    if tokens >= _MOST_SLOTS or (weights.device.type == "cpu" and needed > psutil.virtual_memory().available):
        raise EngineError(advice)
    try:
        return KvCache(model.config, num_blocks, block_size, weights.dtype, weights.device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise EngineError(advice) from error


def _tokens_that_fit(model: Decoder, config: EngineConfig, probe: ModelRunner) -> int:
    """Cache tokens for which memory is left after the weights and the largest step."""
    device = model.weight_format.device
    if device.type != "cuda":
        return CPU_CACHE_TOKENS
    torch.cuda.reset_peak_memory_stats(device)
    probe.run_empty(config.max_batch_tokens)
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    left = free - activations - (1 - config.memory_fraction) * total
    fitting = int(left // KvCache.bytes_per_token(model.config, model.weight_format.dtype))
    tokens = min(fitting, _MOST_SLOTS - 2 * config.block_size) // config.block_size * config.block_size
    if tokens < 2 * config.block_size:
        raise EngineError(
            f"after weights and activations {max(left, 0) / 2**30:.1f} GiB of {device} are left for the KV cache; give "
            "a larger memory_fraction or a smaller max_batch_tokens"
        )
    return tokens


def _capture(runner: ModelRunner, config: EngineConfig) -> None:
    sizes = [size for size in GRAPH_SIZES if size < config.max_seqs] + [config.max_seqs]
    most = min(config.prompt_graph_tokens, config.max_batch_tokens)
    prompt_sizes = [size for size in PROMPT_SIZES if size <= most]
    try:
        runner.capture(sizes, prompt_sizes)
    except torch.OutOfMemoryError as error:
        raise EngineError(
            "no memory for CUDA graphs; give a smaller max_context, max_seqs or memory_fraction"
        ) from error
