"""Guards around a whole model, where `loading` has those of single INT8 layers.

A norm, an embedding, a bias or a router that the checkpoint lacks, or that it holds in INT8 where vLLM computes in
floating point, would leave a server that starts and says nonsense. Each is refused by name, when the model is loaded
and when it is reloaded.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rowint8.vllm_plugin import attached
from rowint8.vllm_plugin.ignore import warn_of_unmatched
from rowint8.vllm_plugin.loading import Int8Method
from rowint8.vllm_plugin.logits import LogitsWatch

_GUARDS: WeakKeyDictionary[nn.Module, "ModelGuard"] = WeakKeyDictionary()

ALL_THE_SAME = """--model-loader-extra-config '{"enable_weights_track": false}' loads it all the same"""


def guard(model: nn.Module, config: Any, model_config: Any) -> None:
    """Guards a model that vLLM has built and not yet loaded. `config` is vLLM's whole, `model_config` the model's."""
    extra = config.load_config.model_loader_extra_config
    tracked = not (isinstance(extra, dict) and extra.get("enable_weights_track") is False)
    _GUARDS[model] = ModelGuard(model, tracked, model_config.runner_type == "draft", config.quant_config)
    warn_of_unmatched(model, config)
    LogitsWatch(model_config.dtype).install(model)


def config_of(model: nn.Module) -> Any:
    """The `RowInt8Config` of a guarded model; None of another."""
    return _GUARDS[model].config if model in _GUARDS else None


def check_reload(model: nn.Module) -> None:
    """Called when the last weight of a reload has been given; ValueError if any is missing."""
    if model in _GUARDS and _is_reloading(model):
        _GUARDS[model].check_reload(model)


class ModelGuard:
    """Notes which of a model's parameters a checkpoint fills.

    Args:
        model: built, with its parameters not yet loaded.
        tracked: whether a missing parameter is an error.
        is_draft: whether the model is a drafter, whose embedding and head may be those of another model.
        config: the `RowInt8Config` that it was built with.
    """

    def __init__(self, model: nn.Module, tracked: bool, is_draft: bool, config: Any = None) -> None:
        self.config = config
        self.tracked = tracked
        self.is_draft = is_draft
        self.needed = self._needed(model)
        self.given: set[str] | None = set()
        self.is_loaded = False
        refuse_int8_in_others(model)
        attached.set_function(model, "load_weights", self._noting(model))

    def _noting(self, model: Any) -> Callable:
        """The model's `load_weights`, which notes what was given, and checks it in the first load."""
        load = model.load_weights

        @wraps(load)
        def load_weights(weights: Iterable[tuple[str, Tensor]], *args: Any, **options: Any) -> set[str] | None:
            try:
                given = load(weights, *args, **options)
            except KeyError as error:  # of a model that has no parameter of this name
                name = str(error.args[0])
                raise (ValueError(_int8_message(name)) if name.endswith(".weight_scale") else error) from error
            self.given = None if given is None or self.given is None else self.given | _plain(given)
            if not self.is_loaded and not _is_reloading(model):
                self.needed = self._needed(model)  # some models tie their head to the embedding when they are loaded
                self._refuse_missing()
            self.is_loaded = True
            return given

        return load_weights

    def check_reload(self, model: nn.Module) -> None:
        """ValueError if the reload that ends gave an INT8 layer nothing, or left out another parameter."""
        infos = {name: get_layerwise_info(layer) for name, layer in _int8_layers(model)}
        lacking = [name for name, info in infos.items() if info.can_load() and not info.load_numel]
        if lacking and self.tracked:
            raise ValueError(f"the reload gives nothing for {_some(lacking)}; a reload must give all weights")
        self._refuse_missing()

    def _refuse_missing(self) -> None:
        given, self.given = self.given, set()
        if given is None or not self.tracked:  # the model does not say what it was given
            return
        lacking = [names[0] for names in self.needed if given.isdisjoint(names)]
        if lacking:
            raise ValueError(f"the checkpoint lacks {_some(lacking)}; fetch the model again, or {ALL_THE_SAME}")

    def _needed(self, model: nn.Module) -> list[list[str]]:
        """Names of every parameter outside INT8 layers that a checkpoint must fill; several for one that is shared."""
        names: dict[int, list[str]] = {}
        for prefix, layer in model.named_modules(remove_duplicate=False):
            if not self._may_be_unfilled(layer):
                for name, parameter in layer.named_parameters(prefix, recurse=False):
                    if parameter.numel():
                        names.setdefault(id(parameter), []).append(name)
        return list(names.values())

    def _may_be_unfilled(self, layer: Any) -> bool:
        """INT8 layers, which refuse for themselves; scales of a KV cache; what a drafter shares with its target."""
        method = getattr(layer, "quant_method", None)
        return isinstance(method, Int8Method | BaseKVCacheMethod) or (
            self.is_draft and isinstance(layer, VocabParallelEmbedding)
        )


def refuse_int8_in_others(model: nn.Module) -> None:
    """Makes the parameters outside INT8 layers refuse INT8 numbers, which vLLM would take without their scale."""
    guarded = {id(parameter) for _, layer in _int8_layers(model) for parameter in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in guarded:
            load = getattr(parameter, "weight_loader", default_weight_loader)
            attached.set_loader(parameter, _refusing_int8(load, name))


def _refusing_int8(load: Callable, name: str) -> Callable:
    @wraps(load)
    def refusing(param: Tensor, loaded_weight: Tensor, *args: Any, **options: Any) -> Any:
        if loaded_weight.dtype == torch.int8:
            raise ValueError(_int8_message(name))
        return load(param, loaded_weight, *args, **options)

    return refusing


def _int8_message(name: str) -> str:
    layer = name.rpartition(".")[0]
    refusal = f"{name}: the checkpoint holds this layer in INT8, and vLLM computes it unquantized"
    return f"{refusal}; quantize the model again with --ignore {layer}"


def _int8_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Names and layers that take INT8 weights of their own."""
    layers: list[tuple[str, Any]] = list(model.named_modules())
    methods = [(name, layer, getattr(layer, "quant_method", None)) for name, layer in layers]
    return [(name, layer) for name, layer, method in methods if isinstance(method, Int8Method) and method.owns_weights]


def _is_reloading(model: nn.Module) -> bool:
    """Whether vLLM has put the model's layers back into the checkpoint's form, to load them again."""
    return any(get_layerwise_info(layer).kernel_tensors is not None for layer in model.modules())


def _plain(names: Iterable[str]) -> set[str]:
    """The names as they are without LoRA."""
    return {name.replace(".base_layer.", ".") for name in names}


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
