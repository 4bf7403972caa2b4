"""The plugin's operators that follow one another become one: an Inductor pass, behind those that fuse.

From the output of one attention to the next, a layer that is not split over ranks is such a sequence: o, norm, gate_up,
down, norm, qkv. See `kernels.sequence` for what that saves. A collective, an adapter or anything else that reads an
output on the way ends a sequence, and the next begins behind it.
"""

import operator
import sys
from collections.abc import Sequence
from inspect import getsource
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from vllm.compilation.passes.inductor_pass import InductorPass

from rowint8.kernels import sequence
from rowint8.kernels.sequence import Value, told

_MEMBERS = {
    getattr(torch.ops.rowint8, name).default: name
    for name in (
        "linear",
        "swiglu",
        "add_rms_norm",
        "quantize_tokens",
        "linear_int8",
        "swiglu_int8",
        "add_rms_norm_int8",
    )
}


class Sequences(InductorPass):
    """The pass."""

    def __call__(self, graph: fx.Graph) -> None:
        for members in _sequences(graph):
            _join(graph, members)

    def uuid(self) -> str:
        return self.hash_source(*(getsource(module) for module in (sys.modules[__name__], sequence)))


def _sequences(graph: fx.Graph) -> list[list[fx.Node]]:
    """Runs of two members and more, each of which can be computed where its last member stands."""
    found: list[list[fx.Node]] = []
    members: list[fx.Node] = []
    outputs: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_member(node):
            members.append(node)
            outputs.add(node)
        elif node.target is operator.getitem and node.args[0] in outputs:
            outputs.add(node)
        elif not _may_be_passed(node) or any(each in outputs for each in node.all_input_nodes):
            found.append(members)
            members, outputs = [], set()
    return [each for each in [*found, members] if len(each) > 1]


def _is_member(node: fx.Node) -> bool:
    """Whether it is one of our operators, of tensors and constants."""
    tensors = (isinstance(each.meta.get("val"), torch.Tensor) for each in node.all_input_nodes)
    return node.target in _MEMBERS and not node.kwargs and all(tensors)


def _may_be_passed(node: fx.Node) -> bool:
    """Whether it changes nothing that a member reads, so that members may move behind it."""
    if isinstance(node.target, OpOverload):
        return not node.target._schema.is_mutable
    return node.op in ("placeholder", "get_attr") or node.target is operator.getitem


def _join(graph: fx.Graph, members: Sequence[fx.Node]) -> None:
    """Puts a sequence where the last of its members stands."""
    outputs = {node: _outputs(node) for node in members}
    inside = {*members, *(each for of_node in outputs.values() for each in of_node)}
    tensors = list(dict.fromkeys(each for node in members for each in node.all_input_nodes if each not in inside))
    numbers, count = {node: place for place, node in enumerate(tensors)}, len(tensors)
    steps = []
    for node in members:
        steps.append((_MEMBERS[node.target], [_argument(each, numbers) for each in node.args]))  # type: ignore[index]
        numbers |= {each: count + place for each, place in outputs[node].items()}
        count += len(node.meta["val"]) if _has_several(node) else 1
    read = [node for node in numbers if node in inside and any(user not in inside for user in node.users)]
    results = {numbers[node]: node.meta["val"] for node in read}
    with graph.inserting_after(members[-1]):
        joined = graph.call_function(torch.ops.rowint8.sequence.default, (tensors, told(steps, list(results))))
    joined.meta = {"val": list(results.values())}
    for node in read:
        with graph.inserting_after(joined):
            result = graph.call_function(operator.getitem, (joined, list(results).index(numbers[node])))
        result.meta = node.meta.copy()
        node.replace_all_uses_with(result)
    for node in reversed([node for node in graph.nodes if node in inside]):
        graph.erase_node(node)


def _outputs(node: fx.Node) -> dict[fx.Node, int]:
    """The nodes that stand for a member's outputs, and the place of each among them."""
    return {user: user.args[1] for user in node.users} if _has_several(node) else {node: 0}  # type: ignore[misc]


def _has_several(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], torch.Tensor)


def _argument(given: Any, numbers: dict[fx.Node, int]) -> Any:
    return Value(numbers[given]) if isinstance(given, fx.Node) else given
