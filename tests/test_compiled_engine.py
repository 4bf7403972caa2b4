"""torch.compile and CUDA graphs change no token."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from rowint8.baseline_engine.layers import RmsNorm, WeightFormat
from rowint8.baseline_engine.sampler import SamplingParams
from rowint8.eval.bench_vllm_probe import Compilations
from tests.engine_harness import assert_all_memory_returned, engine_for, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny

PROMPTS = prompts_of_ids(3, 17, 1, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("quantization", ["none", "rowint8"])
def test_compiled_equals_eager_and_compiles_nothing_once_it_has_started(folder, quantization):
    eager = engine_for(folder, quantization=quantization)
    assert eager.compile_seconds == 0
    engine = engine_for(folder, quantization=quantization, mode="compile")
    assert engine.compile_seconds > 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS[1:]):
        expected = tokens_of(eager, prompts, SamplingParams(max_tokens=12))
        assert tokens_of(engine, prompts, SamplingParams(max_tokens=12)) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert_all_memory_returned(engine)


def test_a_compiled_sum_is_no_part_of_the_product_before_it():
    form = WeightFormat(torch.bfloat16, torch.device("cpu"), int8=False)
    norm, product = RmsNorm(64, 1e-5, form), torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.ones_(norm.weight)
    x, residual = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def layer(x, residual):
        return norm.add(product(x), residual)

    with torch.inference_mode():
        (_, total), code = run_and_get_code(torch.compile(layer), x, residual)
        assert "addmm" not in "".join(code)
        torch.testing.assert_close(total, layer(x, residual)[1], rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "rowint8"])
@pytest.mark.parametrize("mode", ["eager", "compile", "graph"])
def test_cuda_equals_cpu(folder, quantization, mode):
    params = SamplingParams(max_tokens=16)
    expected = tokens_of(engine_for(folder, quantization=quantization), PROMPTS, params)
    limits = {"max_batch_tokens": 256, "max_seqs": 8, "cache_tokens": 512}
    cuda = engine_for(folder, quantization=quantization, mode=mode, device="cuda", **limits)
    assert tokens_of(cuda, PROMPTS, params) == expected
    assert [tokens_of(cuda, [prompt], params)[0] for prompt in PROMPTS] == expected
    sampled = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=1)
    assert tokens_of(cuda, PROMPTS, sampled) == tokens_of(cuda, PROMPTS, sampled)
    assert cuda.metrics is not None
    assert cuda.metrics.peak_mem > cuda.metrics.weight_bytes
    assert bool(cuda.runner.graphs) == (mode == "graph")
    assert_all_memory_returned(cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "compile", "graph"])
def test_no_request_waits_for_a_kernel(folder, mode):
    limits = {"max_batch_tokens": 512, "max_seqs": 40, "cache_tokens": 4096, "int8_lm_head": True}
    cuda = engine_for(folder, quantization="rowint8", mode=mode, device="cuda", dtype="bfloat16", **limits)
    compilations = Compilations()
    for lengths in ([1], [3, 40, 90], range(1, 41), [90] * 6):
        tokens_of(cuda, prompts_of_ids(*lengths), SamplingParams(max_tokens=4))
    assert compilations.read() == []


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "rowint8"])
def test_prompts_in_graphs_say_what_they_say_without(folder, quantization):
    """In bf16, as FlashAttention needs it: likelihoods of the first token and of one that follows a graph's step."""
    limits = {"dtype": "bfloat16", "device": "cuda", "cache_tokens": 4096, "prompt_graph_tokens": 1024}
    eager, graph = (engine_for(folder, quantization=quantization, mode=mode, **limits) for mode in ("eager", "graph"))
    if not graph.runner.prompt_graphs:
        pytest.skip("attention here captures no prompts")
    for prompts in (prompts_of_ids(90), prompts_of_ids(3, 17, 1, 30), prompts_of_ids(*[20] * 40)):
        params = SamplingParams(max_tokens=2, logprobs=5)
        pairs = zip(eager.generate(prompts, params), graph.generate(prompts, params), strict=True)
        for expected, got in pairs:
            first, other = expected.logprobs[0].top, got.logprobs[0].top
            for token in first.keys() & other.keys():
                assert abs(first[token] - other[token]) < 0.05
            assert len(first.keys() & other.keys()) >= 3


@pytest.mark.gpu
def test_graphs_survive_preemption_and_small_budgets(folder):
    prompts, params = prompts_of_ids(2, 11, 40, 5, 25, 33), SamplingParams(max_tokens=20)
    expected = tokens_of(engine_for(folder), prompts, params)
    small = {"cache_tokens": 80, "block_size": 16, "max_context": 80, "max_batch_tokens": 12, "max_seqs": 5}
    cuda = engine_for(folder, mode="graph", device="cuda", **small)
    assert tokens_of(cuda, prompts, params) == expected
    assert cuda.scheduler.num_preemptions > 0
    assert_all_memory_returned(cuda)


@pytest.mark.gpu
def test_the_cache_takes_the_memory_that_is_left(smollm2):
    engine = engine_for(smollm2, dtype="bfloat16", device="cuda", memory_fraction=0.3, max_context=2048)
    total = torch.cuda.mem_get_info()[1]
    assert 0.2 * total < engine.runner.cache.data.nbytes < 0.3 * total
    assert len(tokens_of(engine, ["The capital of France is"], SamplingParams(max_tokens=4))[0]) == 4
