"""`rowint8::sequence`: how it is told, what it keeps, and that it is the operators one after another."""

import weakref

import pytest
import torch

from rowint8.kernels import ops, sequence
from rowint8.kernels.quantize import quantize_rowwise
from rowint8.kernels.sequence import Value, told

K = 48
STEPS = [
    ("quantize_tokens", [Value(0), 16]),
    ("linear_int8", [Value(3), Value(4), Value(1), Value(2), None, torch.float16]),
    ("quantize_tokens", [Value(5), 16]),
]


def given(tokens=3):
    return [torch.randn(tokens, K), *quantize_rowwise(torch.randn(K, K), block=16)]


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_it_is_its_steps_one_after_another(tokens):
    x, values, scale = given(tokens)
    q, token_scale = ops.quantize_tokens(x, 16)
    out = ops.linear_int8(q, token_scale, values, scale, None, torch.float16)
    got = torch.ops.rowint8.sequence([x, values, scale], told(STEPS, [5, 7, 3]))
    torch.testing.assert_close(got, [out, ops.quantize_tokens(out, 16)[1], q], rtol=0, atol=0)


def test_torch_finds_nothing_wrong_with_it():
    torch.library.opcheck(torch.ops.rowint8.sequence.default, (given(), told(STEPS, [5, 6])))


def test_on_cuda_it_calls_the_launchers_that_the_operators_call(monkeypatch):
    def linear(x, values, scale, bias=None):
        return x + 1

    monkeypatch.setitem(sequence.OPERATORS, "linear", sequence.OPERATORS["linear"]._replace(cuda=linear))
    x = torch.zeros(2, 3, K)
    (out,) = sequence._run(sequence._launch, [x], told([("linear", [Value(0), None, None])] * 2, [2]))
    assert out.shape == x.shape
    torch.testing.assert_close(out, x + 1)


def test_memory_that_no_later_step_reads_is_given_back():
    seen = []

    def call(name, x):
        alive = sum(each() is not None for each in seen)
        out = x + 1
        seen.append(weakref.ref(out))
        assert alive <= 1
        return out

    steps = [("linear", [Value(number)]) for number in range(5)]
    sequence._run(call, [torch.zeros(1)], told(steps, [5]))
    assert len(seen) == 5


def test_arguments_that_do_not_fit_are_refused_when_it_is_traced():
    x, values, scale = given()
    text = told(STEPS, [5])
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="32"):
        torch.compile(lambda x: torch.ops.rowint8.sequence([x, values, scale], text))(x[:, :32])
