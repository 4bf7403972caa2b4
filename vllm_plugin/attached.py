"""The attributes that this plugin sets on vLLM's models, layers and parameters. No other file sets one.

On a parameter:

    weight_loader        vLLM's: the function that copies a tensor of the checkpoint into it
    loaded_parts         ours: how many numbers the checkpoint filled, by the part of a merged layer
    weight_loader_numel  vLLM's: how many the checkpoint has to fill, where padding makes them fewer than all
    vocab_layer          ours, on an embedding's weight: the layer (a weak reference), for a head that shares the weight

On a layer:

    weight_loader                                  vLLM's: loads the bias, which vLLM registers after `create_weights`
    _already_called_process_weights_after_loading  vLLM's: whether the weights are quantized; a reload deletes it

On a model:

    load_weights    vLLM's: wrapped by `guard`, which notes what it was given
    compute_logits  vLLM's: wrapped by `logits`, which looks for NaN

The parts stand on the parameter, not in a method, because vLLM copies a parameter with its attributes when it moves it
from the meta device and for every reload.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import ref

from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter


def note_part(param: Any, part: tuple, numel: int) -> None:
    """Notes that the checkpoint filled so many numbers of the part of the parameter."""
    param.loaded_parts = loaded_parts(param) | {part: numel}


def loaded_parts(param: Any) -> dict[tuple, int]:
    """Numbers that the checkpoint filled, by part; () is the whole parameter."""
    return getattr(param, "loaded_parts", {})


def expect_rows(param: Any, rows: int) -> None:
    """Says that the checkpoint fills only the first rows; the others are padding."""
    param.weight_loader_numel = rows * param[:1].numel()


def expected_numel(param: Tensor) -> int:
    """Numbers of the parameter that the checkpoint has to fill."""
    return getattr(param, "weight_loader_numel", param.numel())


def set_vocab_layer(layer: Any) -> None:
    """Lets `vocab_layer` find the layer from its weight."""
    layer.weight.vocab_layer = ref(layer)


def vocab_layer(weight: Any) -> Any:
    """The embedding layer whose weight this is."""
    return weight.vocab_layer()


def set_loader(param: Any, loader: Callable) -> None:
    """Sets the function by which vLLM loads the parameter."""
    param.weight_loader = loader


def set_function(model: Any, name: str, function: Callable) -> None:
    """Makes the model use a function in place of its method of that name."""
    setattr(model, name, function)


def set_bias_loader(layer: Any, loader: Callable) -> None:
    """Sets the loader of the bias that vLLM registers next.

    vLLM calls it for weights too: where a checkpoint holds the parts of a merged layer as one, for each part in turn.
    """
    load_weights = layer.weight_loader

    @wraps(load_weights)
    def load(param: Any, *rest: Any) -> Any:
        return (load_weights if isinstance(param, BasevLLMParameter) else loader)(param, *rest)

    layer.weight_loader = load


def is_processed(layer: Any) -> bool:
    """Whether the weights have been quantized since they were loaded."""
    return getattr(layer, "_already_called_process_weights_after_loading", False)


def set_processed(layer: Any) -> None:
    """Says that the weights have been quantized. vLLM's own methods set the same flag."""
    layer._already_called_process_weights_after_loading = True
