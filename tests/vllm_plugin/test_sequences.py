"""Which operators of a graph become one sequence, and that it says what they say."""

import json

import pytest

pytest.importorskip("vllm")

import torch

from rowint8.kernels import ops
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.vllm_plugin.sequences import Sequences

H, I, BLOCK = 32, 48, 16


def operators_of(graph) -> list[str]:
    """Names of this project's operators in a graph in order, those in sequences, too."""
    names = []
    for node in graph.nodes:
        if node.target is torch.ops.rowint8.sequence.default:
            names += [name for name, _ in json.loads(node.args[1])[0]]
        elif "rowint8" in str(node.target):
            names.append(node.target._opname)
    return names


class Recorder(Sequences):
    """The pass, which remembers what it left: names of operators, those of a sequence in a list of their own."""

    def __call__(self, graph):
        super().__call__(graph)
        graph.lint()
        nodes = [node for node in graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)]
        self.left = [operators_of(_Only(node)) or str(node.target) for node in nodes]


class _Only:
    def __init__(self, node):
        self.nodes = [node]


def compiled(function, *given, dynamic=False) -> tuple:
    torch._dynamo.reset()
    recorder = Recorder()
    settings = {"post_grad_custom_post_pass": recorder, "fx_graph_cache": False}
    return torch.compile(function, options=settings, dynamic=dynamic)(*given), recorder.left


def weight(rows, columns):
    return quantize_rowwise(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)), block=BLOCK)


O, GATE_UP, DOWN, QKV = weight(H, H), weight(2 * I, H), weight(H, I), weight(3 * H, H)


def tokens(count=5, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(count)
    x, residual = torch.randn(2, count, H, generator=draw).to(dtype)
    return x, residual, torch.randn(H, generator=draw).to(dtype)


def weight_only(x, residual, norm):
    """A layer from one attention to the next."""
    normed, residual = ops.add_rms_norm(ops.linear(x, *O), residual, norm, 1e-5)
    normed, residual = ops.add_rms_norm(ops.linear(ops.swiglu(normed, *GATE_UP), *DOWN), residual, norm, 1e-5)
    return ops.linear(normed, *QKV, norm.repeat(3)), residual


def rounded(x, residual, norm):
    """The same with INT8 activations."""
    out = ops.linear_int8(*ops.quantize_tokens(x, BLOCK), *O, None, x.dtype)
    q, scale, residual = ops.add_rms_norm_int8(out, residual, norm, 1e-5, BLOCK)
    hidden = ops.swiglu_int8(q, scale, *GATE_UP, x.dtype)
    out = ops.linear_int8(*ops.quantize_tokens(hidden, BLOCK), *DOWN, None, x.dtype)
    q, scale, residual = ops.add_rms_norm_int8(out, residual, norm, 1e-5, BLOCK)
    return ops.linear_int8(q, scale, *QKV, None, x.dtype), residual


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("layer", "steps"), [(weight_only, 6), (rounded, 8)])
def test_a_layer_is_one_sequence_with_the_same_bits(layer, steps, dtype):
    given = tokens(dtype=dtype)
    got, left = compiled(layer, *given)
    sequences = [names for names in left if isinstance(names, list)]
    assert [len(names) for names in sequences] == [steps]
    torch.testing.assert_close(got, layer(*given), rtol=0, atol=0)


def test_one_graph_serves_every_number_of_tokens():
    torch._dynamo.reset()
    recorder = Recorder()
    settings = {"post_grad_custom_post_pass": recorder, "fx_graph_cache": False}
    function = torch.compile(rounded, options=settings, dynamic=True)
    for count in (1, 2, 7, 33):
        torch.testing.assert_close(function(*tokens(count)), rounded(*tokens(count)), rtol=0, atol=0)
    assert [len(names) for names in recorder.left if isinstance(names, list)] == [8]


def test_what_reads_an_output_on_the_way_ends_a_sequence():
    """As the sum over ranks does behind o and down."""

    def split(x, residual, norm):
        summed = torch.cumsum(ops.linear(x, *O).float(), 0).to(x.dtype)
        normed, residual = ops.add_rms_norm(summed, residual, norm, 1e-5)
        down = ops.linear(ops.swiglu(normed, *GATE_UP), *DOWN)
        return torch.cumsum(down.float(), 0).to(x.dtype), residual

    given = tokens()
    got, left = compiled(split, *given)
    assert [names for names in left if isinstance(names, list)] == [["linear"], ["add_rms_norm", "swiglu", "linear"]]
    torch.testing.assert_close(got, split(*given), rtol=0, atol=0)


def test_an_operator_alone_stays_one():
    given = tokens()
    got, left = compiled(lambda x, *_: torch.sin(ops.linear(torch.cos(x), *O)), *given)
    assert ["linear"] in left
    assert not any("sequence" in str(name) for name in left)
    torch.testing.assert_close(got, torch.sin(ops.linear(torch.cos(given[0]), *O)), rtol=2e-2, atol=2e-2)


def test_an_output_that_others_read_is_handed_out_however_many_read_it():
    def shared(x, residual, norm):
        normed, total = ops.add_rms_norm(x, residual, norm, 1e-5)
        first, second = ops.linear(normed, *O), ops.linear(normed, *QKV)
        return first, total, second, normed

    given = tokens()
    got, left = compiled(shared, *given)
    assert ["add_rms_norm", "linear", "linear"] in left
    torch.testing.assert_close(got, shared(*given), rtol=0, atol=0)


def test_a_sequence_does_not_reach_over_what_changes_memory():
    def writes(x, residual, norm):
        first = ops.linear(x, *O)
        residual.mul_(2)
        return ops.linear(first, *QKV), ops.linear(residual, *O)

    given = tokens()
    expected = writes(*(each.clone() for each in given))
    got, _ = compiled(writes, *given)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
