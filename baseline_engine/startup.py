"""What happens once, before the first request: load, choose, measure memory, compile, capture."""

import logging
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

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
from rowint8.kernels.activations import LARGEST_BLOCK
from rowint8.kernels.cpu_build import library

if TYPE_CHECKING:
    from rowint8.kernels.warmup import WeightShape

_logger = logging.getLogger(__name__)

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
    _say_unrotated(model)
    return model, Tokenizer(folder) if has_tokenizer(folder) else None


def _say_unrotated(model: Decoder) -> None:
    """One line where layers with INT8 activations cannot be rotated, which leaves them further from the original."""
    found = {part.in_features for part in model.modules() if isinstance(part, Int8Linear) and part.block == 1}
    if found:
        sizes = ", ".join(map(str, sorted(found)))
        _logger.warning("layers with %s inputs are not rotated: no power of two from 16 on divides them", sizes)


def weight_format(config: EngineConfig, model: ModelConfig, device: torch.device) -> WeightFormat:
    """How the weights are held; raises EngineError where the settings contradict each other or the model."""
    int8 = config.quantization == "rowint8" or model.stored_int8 is not None
    for given, what in (
        (config.fused, "fused SwiGLU is an INT8 operator"),
        (config.int8_lm_head, "int8_lm_head is part of rowint8"),
        (config.activations, "INT8 activations are multiplied by INT8 weights"),
    ):
        if given and not int8:
            raise SettingError(f"{what}; give quantization rowint8 with it")
    if config.fused and model.mlp_bias:
        raise EngineError("this model's MLP has a bias, which the fused SwiGLU has not; give --no-fused")
    fused = int8 and not model.mlp_bias if config.fused is None else config.fused
    rotation, dtype = _rotation(config, model, device), config.torch_dtype(model)
    if model.experts and not int8 and dtype != torch.bfloat16 and config.mode_on(device) != "eager":
        raise EngineError(
            f"torch compiles grouped products of bfloat16 alone, and these experts are {dtype}; give dtype bfloat16, "
            "quantization rowint8 or mode eager"
        )
    return WeightFormat(dtype, device, int8, fused, config.int8_lm_head, rotation)


def _rotation(config: EngineConfig, model: ModelConfig, device: torch.device) -> int | None:
    """The largest rotated block of INT8 activations, None without them; EngineError where they cannot be had."""
    stored = model.stored_int8
    if stored and config.activations and stored.rotation is None:
        raise EngineError(
            "activations is int8, and the checkpoint holds INT8 rows that are not rotated for it; give the original, "
            "or what `rowint8 quantize --activations int8` made of it"
        )
    rotation = stored.rotation if stored else LARGEST_BLOCK if config.activations else None
    obstacle = _obstacle(model, config.torch_dtype(model), device) if rotation else None
    if obstacle and stored:
        raise EngineError(f"the checkpoint is for INT8 activations, and {obstacle}; give the original")
    if obstacle:
        _logger.warning("activations are not rounded to INT8: %s", obstacle)
    return None if obstacle else rotation


def _obstacle(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the device does not multiply the model's INT8 activations, or not fast, if so."""
    if device.type != "cuda":
        return None
    from rowint8.kernels.experts.tiles import why_not_int8
    from rowint8.kernels.tiles.card import why_weight_only

    if slow := why_weight_only(device):
        return f"on this card {slow}"
    experts = model.experts
    return why_not_int8(dtype, model.hidden_size, experts.intermediate_size, device) if experts else None


def make_runner(model: Decoder, config: EngineConfig) -> tuple[ModelRunner, float]:
    """A runner whose cache fills the memory that it may take, and the seconds spent on compiling and capturing.

    No kernel and no graph of the model is compiled after this.

    Raises:
        EngineError: memory suffices for no cache, or not for the context asked for.
    """
    weights, size, mode = model.weight_format, config.block_size, config.mode_on(model.weight_format.device)
    backend = attention.choose(model.config, weights.dtype, weights.device, size)
    most = min(config.max_context or model.config.max_position_embeddings, model.config.max_position_embeddings)
    warmed = _warm_up(model, config) if weights.int8 else 0.0
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
    start, weights = perf_counter(), model.weight_format
    if weights.device.type == "cpu" and weights.rotation is None:
        return 0.0
    if weights.device.type == "cpu":
        library()
        return perf_counter() - start
    from rowint8.kernels.experts.hopper import Rotation
    from rowint8.kernels.experts.warmup import warmup as warmup_experts
    from rowint8.kernels.warmup import warmup

    needed = [(list(_calls(model)), config.max_batch_tokens)]
    if isinstance(model.lm_head, Int8Linear):
        needed.append((list(_product_calls(model.lm_head, "linear")), config.max_seqs))
    try:
        for calls, most in needed:
            warmup(calls, weights.dtype, weights.device, most)
        if model.config.experts:
            experts: Any = model.layers[0].mlp
            blocks, topk = experts.blocks(), model.config.experts.topk
            rotation = Rotation(*blocks) if blocks else None
            given = experts.int8_weights(), topk, weights.dtype, config.max_batch_tokens
            warmup_experts(*given, rotation=rotation)
    except ValueError as error:  # a damaged file of tiles, or a card that no kernel is for
        raise EngineError(str(error)) from error
    return perf_counter() - start


def _calls(model: Decoder) -> "Iterator[WeightShape]":
    """What a step calls with all its tokens. All layers are alike."""
    from rowint8.kernels.warmup import WeightShape

    layer: Any = model.layers[0]
    for part in (layer.attention.qkv, layer.attention.o):
        yield from _product_calls(part, "linear")
    if model.config.experts is None:
        yield from _product_calls(layer.mlp.down, "linear")
        yield from _product_calls(layer.mlp.gate_up, "swiglu" if layer.mlp.fused else "linear")
    for norm in (layer.post_norm, model.norm):
        if norm.fused:
            size = model.config.hidden_size
            op, n = ("add_rms_norm_int8", norm.block) if norm.block else ("add_rms_norm", size)
            yield WeightShape(op, n, size)


def _product_calls(layer: Int8Linear, op: Literal["linear", "swiglu"]) -> "Iterator[WeightShape]":
    from rowint8.kernels.warmup import WeightShape

    n, k = layer.values.shape
    if layer.block:
        yield WeightShape("quantize_tokens", layer.block, k)
    int8_op = "linear_int8" if op == "linear" else "swiglu_int8"
    yield WeightShape(int8_op if layer.block else op, n, k, layer.bias is not None)


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
