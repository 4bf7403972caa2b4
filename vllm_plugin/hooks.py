"""Lets this plugin act when a model is built, when a checkpoint's files are read, and when a reload ends.

vLLM checks that a checkpoint filled a model only where the model is not quantized, and a quantization method is asked
about single layers only. So three functions of vLLM are wrapped, once in a process. Models that vLLM builds without
rowint8 pass through them unchanged.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any


def install() -> None:
    """Wraps the three functions. Calling it again changes nothing."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.reload import layerwise

    _replace(base_loader, "initialize_model", _guarding)
    _replace(DefaultModelLoader, "get_all_weights", _choosing_files)
    _replace(layerwise, "finalize_layerwise_processing", _checking_reload)


def _replace(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
    function = getattr(owner, name)
    if not hasattr(function, "rowint8"):
        wrapped: Any = wraps(function)(wrap(function))
        wrapped.rowint8 = True
        setattr(owner, name, wrapped)


def _guarding(initialize: Callable) -> Callable:
    def initialize_model(vllm_config: Any, **options: Any) -> Any:
        model = initialize(vllm_config=vllm_config, **options)
        if _is_ours(vllm_config):
            from rowint8.vllm_plugin.guard import guard
            from rowint8.vllm_plugin.summary import log_summary

            guard(model, vllm_config, options.get("model_config") or vllm_config.model_config)
            log_summary(model, vllm_config)
        return model

    return initialize_model


def _choosing_files(get_all_weights: Callable) -> Callable:
    def get_all(loader: Any, model_config: Any, model: Any) -> Any:
        from rowint8.vllm_plugin.guard import config_of
        from rowint8.vllm_plugin.shards import one_of_each

        weights, config = get_all_weights(loader, model_config, model), config_of(model)
        return one_of_each(weights, model_config, loader.load_config, config) if config else weights

    return get_all


def _checking_reload(finalize: Callable) -> Callable:
    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        from rowint8.vllm_plugin.guard import check_reload

        check_reload(model)
        finalize(model, model_config)

    return finalize_layerwise_processing


def _is_ours(vllm_config: Any) -> bool:
    return vllm_config.quant_config is not None and vllm_config.quant_config.get_name() == "rowint8"
