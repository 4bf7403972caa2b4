"""rowint8.eval.quality.lm_eval_engine: the small engine answers lm-eval's requests as lm-eval's own `hf` does."""

import pytest
from lm_eval.api.instance import Instance

LENGTH = 64
"""Tokens the model sees at a time; the long text has more."""
LONG = "The river ran past the mill, under the old stone bridge and through the town. " * 10
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " London"),
    ("Two spaces at the end  ", "belong to what follows"),
    ("", "A text without context, of more than one token."),
    ("", "<|im_start|>one that begins with the prefix token"),
    ("One two three", " four five six seven eight nine ten"),
    (LONG, " At last it stopped."),
    ("Once", " " + LONG[:150]),
    ("The sky is", "."),
]
GENERATIONS = [
    ("Question: What is 2+2?\nAnswer:", {"until": ["\n"], "max_gen_toks": 12}),
    ("The first letters of the alphabet are A, B,", {"until": ["E", "\n\n"], "max_gen_toks": 16, "do_sample": False}),
    ("<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n", {"until": [], "max_gen_toks": 24}),
    (LONG, {"until": ["no such text"], "max_gen_toks": 10, "temperature": 0.0}),
]


def requests(kind, arguments):
    return [Instance(kind, {}, arguments=args, idx=0) for args in arguments]


@pytest.fixture(scope="module")
def hf(smollm2):
    """In fp32, but for the logarithm: torch's own in fp32 is off by 1e-5 a token on the CPU, always to one side."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(smollm2), dtype="float32", device="cpu", max_length=LENGTH, batch_size=4, softmax_dtype="float64")


@pytest.fixture(scope="module")
def ours(smollm2):
    from rowint8.eval.quality.lm_eval_engine import EngineLM

    return EngineLM(str(smollm2), max_length=LENGTH, dtype="float32", device="cpu")


def test_loglikelihood(hf, ours):
    wanted = hf.loglikelihood(requests("loglikelihood", PAIRS))
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    for args, (logprob, greedy), (hf_logprob, hf_greedy) in zip(PAIRS, found, wanted, strict=True):
        assert logprob == pytest.approx(hf_logprob, abs=1e-3), args
        assert greedy == hf_greedy, args
    assert {greedy for _, greedy in found} == {True, False}, "both must have been asked"


def test_what_a_request_is_batched_with_does_not_matter(ours):
    together = ours.loglikelihood(requests("loglikelihood", PAIRS))
    for args, (logprob, greedy) in zip(PAIRS, together, strict=True):
        ((alone, greedy_alone),) = ours.loglikelihood(requests("loglikelihood", [args]))
        assert (alone, greedy_alone) == (pytest.approx(logprob, abs=1e-3), greedy), args


def test_loglikelihood_rolling(hf, ours):
    texts = [("A short text.",), (LONG,), (LONG[:300],)]
    wanted = hf.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) == pytest.approx(wanted, abs=1e-3)


def test_generate_until(hf, ours):
    wanted = hf.generate_until(requests("generate_until", GENERATIONS))
    assert ours.generate_until(requests("generate_until", GENERATIONS)) == wanted
    assert all(wanted), "each should have generated something"


def test_drawing_is_asked_for(ours):
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 5.0, "seed": 3}
    greedy = {**drawn, "do_sample": False}
    ((first, second, likeliest),) = [
        ours.generate_until(requests("generate_until", [("The sky is", o) for o in (drawn, drawn, greedy)]))
    ]
    assert first == second != likeliest
    with pytest.raises(TypeError, match="num_beams"):
        ours.generate_until(requests("generate_until", [("The sky is", {**drawn, "num_beams": 3})]))
