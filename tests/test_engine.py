"""The whole engine against transformers, and what batching, compiling, fusing and streaming must not change."""

from time import perf_counter, sleep

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rowint8.baseline_engine.config import EngineConfig
from rowint8.baseline_engine.engine import Engine
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.kv_cache import KvCache
from rowint8.baseline_engine.sampler import SamplingParams
from rowint8.kernels.quantize import dequantize, quantize_rowwise

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Water boils at",
]
MORE_TEXTS = [
    "In 1492 Columbus sailed across the ocean and",
    "import numpy as np\nx = np.",
    "The mitochondria is the powerhouse of the",
    "To be or not to be, that is the",
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "bias, untied, one kv head": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
    "head_dim not hidden / heads": {"head_dim": 24},
    "no grouping": {"num_key_value_heads": 4},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Writes a tiny random Llama in shards and returns its folder; keywords override its config."""

    def make(**overrides):
        torch.manual_seed(0)
        settings = {
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "eos_token_id": None,
            "bos_token_id": None,
            "initializer_range": 0.2,
        }
        model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
        folder = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(folder, max_shard_size="100KB")
        assert (folder / "model.safetensors.index.json").exists()
        return folder

    return make


def prompts_of_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(128, (length,), generator=generator).tolist() for length in lengths]


def engine_for(folder, **settings) -> Engine:
    return Engine(EngineConfig(str(folder), **({"dtype": "float32", "device": "cpu"} | settings)))


def prompt_logits(engine: Engine, ids: list[int]) -> Tensor:
    """fp32 [tokens, vocabulary]."""
    form = engine.model.form
    cache = KvCache.allocate(engine.model_config, 1, len(ids), form.dtype, form.device)
    with torch.inference_mode():
        hidden = engine.model(torch.tensor([ids]), torch.arange(len(ids))[None], cache, None)
        return engine.model.logits(hidden)[0].float()


def greedy_of_transformers(model, ids: list[int], tokens: int) -> list[int]:
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def round_linears_(model) -> None:
    """Replaces every decoder linear weight by what INT8 rows hold of it."""
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = dequantize(quantize_rowwise(module.weight.data, name=name))


def load_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_greedy_equals_transformers_on_tiny_models(tiny, variant):
    folder = tiny(**variant)
    prompts = prompts_of_ids(1, 7, 30)
    expected = [greedy_of_transformers(load_transformers(folder), ids, 40) for ids in prompts]
    completions = engine_for(folder).generate(prompts, SamplingParams(max_tokens=40))
    assert [completion.token_ids for completion in completions] == expected
    assert len({tuple(tokens) for tokens in expected}) == 3, "the prompts should not all lead to the same text"


def test_greedy_equals_transformers_on_smollm2(smollm2):
    engine = engine_for(smollm2)
    model = load_transformers(smollm2)
    expected = [greedy_of_transformers(model, engine.encode(text), 40) for text in TEXTS]
    completions = engine.generate(TEXTS, SamplingParams(max_tokens=40))
    assert [completion.token_ids for completion in completions] == expected


def test_int8_equals_transformers_with_rounded_weights_on_smollm2(smollm2):
    model = load_transformers(smollm2)
    round_linears_(model)
    engine = engine_for(smollm2, quantization="rowint8")
    ids = engine.encode(TEXTS[2])
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(prompt_logits(engine, ids), expected, rtol=1e-3, atol=1e-3)
    greedy = greedy_of_transformers(model, ids, 32)
    assert engine.generate([ids], SamplingParams(max_tokens=32))[0].token_ids == greedy


@pytest.mark.parametrize("fused", [True, False])
def test_int8_equals_transformers_with_rounded_weights_on_a_tiny_model(tiny, fused):
    folder = tiny(attention_bias=True)
    model = load_transformers(folder)
    round_linears_(model)
    ids = prompts_of_ids(20)[0]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    engine = engine_for(folder, quantization="rowint8", fused=fused)
    assert all(layer.mlp.fused is fused for layer in engine.model.layers)
    torch.testing.assert_close(prompt_logits(engine, ids), expected, rtol=1e-4, atol=1e-4)


def test_int8_with_mlp_bias_runs_unfused_unless_asked(tiny):
    folder = tiny(mlp_bias=True)
    engine = engine_for(folder, quantization="rowint8")
    assert not any(layer.mlp.fused for layer in engine.model.layers)
    model = load_transformers(folder)
    round_linears_(model)
    ids = prompts_of_ids(9)[0]
    with torch.inference_mode():
        torch.testing.assert_close(
            prompt_logits(engine, ids), model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4
        )
    with pytest.raises(EngineError, match="bias"):
        engine_for(folder, quantization="rowint8", fused=True)


def mean_error(close: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(close, exact, strict=True)
    return sum(float(torch.linalg.norm(a - b) / torch.linalg.norm(b)) for a, b in pairs) / len(exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_rounds_no_more_than_transformers_does(smollm2, dtype):
    """The yardstick for rounding of activations is how far transformers itself moves from fp32 to that dtype.

    Rounding errors of one prompt vary by half from one correct implementation to another (transformers' own two kinds
    of attention, say), so they are compared as means over prompts.
    """
    model = load_transformers(smollm2)
    prompts = [engine_for(smollm2).encode(text) for text in TEXTS + MORE_TEXTS]
    with torch.inference_mode():
        exact = [model(torch.tensor([ids])).logits[0] for ids in prompts]
        model.to(getattr(torch, dtype))
        rounded = [model(torch.tensor([ids])).logits[0].float() for ids in prompts]
    allowed = 1.25 * mean_error(rounded, exact)
    for quantization in ("none", "rowint8"):
        engines = (engine_for(smollm2, quantization=quantization, dtype=name) for name in ("float32", dtype))
        fp32, half = ([prompt_logits(engine, ids) for ids in prompts] for engine in engines)
        assert mean_error(half, fp32) < allowed


@pytest.mark.parametrize("quantization", ["none", "rowint8"])
def test_compiled_equals_eager_in_one_graph(tiny, quantization):
    folder, prompts = tiny(), prompts_of_ids(3, 17)
    params = SamplingParams(max_tokens=24)
    eager = engine_for(folder, quantization=quantization)
    expected = [completion.token_ids for completion in eager.generate(prompts, params)]
    assert eager.metrics is not None
    assert eager.metrics.compile_seconds == 0
    compiled = engine_for(folder, quantization=quantization, mode="compile")
    torch._dynamo.utils.counters.clear()
    start = perf_counter()
    first = [completion.token_ids for completion in compiled.generate(prompts, params)]
    elapsed = perf_counter() - start
    assert compiled.metrics is not None
    assert compiled.metrics.compile_seconds > 0
    assert compiled.metrics.wall + compiled.metrics.compile_seconds <= elapsed, "compiling is not part of the wall time"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "all layers and steps share one graph"
    again = [completion.token_ids for completion in compiled.generate(prompts, params)]
    assert compiled.metrics.compile_seconds == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert first == again == expected


def test_compiles_more_shapes_than_torch_would_by_itself(tiny):
    folder = tiny(num_hidden_layers=1)
    eager, compiled = engine_for(folder), engine_for(folder, mode="compile")
    params = SamplingParams(max_tokens=4)
    with torch._dynamo.config.patch(recompile_limit=1):
        for batch in ([3], [3, 4], [3, 4, 5]):
            prompts = prompts_of_ids(*batch)
            expected = [completion.token_ids for completion in eager.generate(prompts, params)]
            assert [completion.token_ids for completion in compiled.generate(prompts, params)] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["none", "rowint8"])
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_cuda_equals_cpu(tiny, quantization, mode):
    folder, prompts = tiny(), prompts_of_ids(3, 17)
    params = SamplingParams(max_tokens=16)
    cpu, cuda = (engine_for(folder, quantization=quantization, mode=mode, device=device) for device in ("cpu", "cuda"))
    expected = [completion.token_ids for completion in cpu.generate(prompts, params)]
    assert [completion.token_ids for completion in cuda.generate(prompts, params)] == expected
    sampled = SamplingParams(max_tokens=16, temperature=1.0, top_p=0.9, seed=1)
    first, again = (cuda.generate(prompts, sampled)[1].token_ids for _ in range(2))
    assert first == again
    assert cuda.metrics is not None
    assert cuda.metrics.peak_mem > cuda.metrics.weight_bytes


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, temperature=1.5, top_k=50, top_p=0.9, seed=7)],
    ids=["greedy", "sampled"],
)
def test_tokens_do_not_depend_on_batch_mates(tiny, params):
    engine, prompts = engine_for(tiny()), prompts_of_ids(2, 11, 40, 5)
    together = [completion.token_ids for completion in engine.generate(prompts, params)]
    alone = [engine.generate([prompt], params)[0].token_ids for prompt in prompts]
    assert together == alone


def test_requests_of_one_batch_may_differ_in_every_parameter(tiny):
    engine, prompts = engine_for(tiny()), prompts_of_ids(6, 6)
    params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=9, temperature=2.0, seed=1)]
    together = [completion.token_ids for completion in engine.generate(prompts, params)]
    assert [len(tokens) for tokens in together] == [3, 9]
    assert together == [
        engine.generate([prompt], param)[0].token_ids for prompt, param in zip(prompts, params, strict=True)
    ]


def test_stops_at_the_end_of_sequence_token(tiny):
    prompt = prompts_of_ids(8)
    free = engine_for(tiny()).generate(prompt, SamplingParams(max_tokens=16))[0].token_ids
    eos = next(token for token in free if token != free[0])
    until = free[: free.index(eos) + 1]
    engine = engine_for(tiny(eos_token_id=[127, eos] if eos != 127 else eos))
    stopped = engine.generate(prompt, SamplingParams(max_tokens=16))[0]
    assert (stopped.token_ids, stopped.finish_reason) == (until, "stop")
    ignored = engine.generate(prompt, SamplingParams(max_tokens=16, ignore_eos=True))[0]
    assert (ignored.token_ids, ignored.finish_reason) == (free, "length")


def test_output_ends_with_the_context(tiny):
    engine = engine_for(tiny(max_position_embeddings=32))
    completion = engine.generate(prompts_of_ids(20), SamplingParams(max_tokens=100))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (12, "length")
    with pytest.raises(EngineError, match="prompt 2 has 32 tokens; the context takes up to 31"):
        engine.generate(prompts_of_ids(4, 32))
    assert len(engine.generate(prompts_of_ids(31), SamplingParams())[0].token_ids) == 1


def test_streams_every_token_and_the_whole_text(smollm2):
    engine = engine_for(smollm2, dtype="auto")
    events = []
    prompts = ["Write three emoji and a word in Chinese.", "Say hello."]
    params = SamplingParams(max_tokens=48, temperature=1.2, seed=3)
    completions = engine.generate(prompts, params, chat=True, on_token=events.append)
    for index, completion in enumerate(completions):
        mine = [event for event in events if event.request == index]
        assert [event.token_id for event in mine] == completion.token_ids
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason
        streamed = "".join(event.text for event in mine)
        assert streamed == completion.text.rstrip("\N{REPLACEMENT CHARACTER}")


def test_stream_joins_characters_cut_across_tokens(smollm2):
    tokenizer = engine_for(smollm2).tokenizer
    assert tokenizer is not None
    text = " naïve 日本語 🙂🏽 end"
    ids, stream = tokenizer.encode(text), tokenizer.stream()
    pieces = [stream.step(token) for token in ids]
    assert "" in pieces, "the text should need more than one token for some character"
    assert "".join(pieces) == text


def test_chat_puts_the_prompt_into_the_template(smollm2):
    engine = engine_for(smollm2)
    assert engine.tokenizer is not None
    with_template = engine.tokenizer._tokenizer.decode(engine.encode("Hello", chat=True))
    assert "<|im_start|>user\nHello<|im_end|>" in with_template
    assert with_template.endswith("<|im_start|>assistant\n")


def test_metrics_of_a_run(tiny):
    engine = engine_for(tiny(), quantization="rowint8")
    completions = engine.generate(prompts_of_ids(4, 9), SamplingParams(max_tokens=5))
    metrics = engine.metrics
    assert metrics is not None
    assert [request.prompt_tokens for request in metrics.requests] == [4, 9]
    assert metrics.output_tokens == sum(len(completion.token_ids) for completion in completions) == 10
    first, second = metrics.requests
    assert 0 < first.ttft < second.ttft < metrics.wall, "prompts are prefilled one after the other"
    assert metrics.load_seconds > 0
    rows = 64 + 32 + 32 + 64 + 2 * 96  # q, k, v, o, gate and up, all with K = 64; down is [64, 96]
    per_layer = 64 * rows + 64 * 96 + 2 * (rows + 64) + 4 * 2 * 64
    assert metrics.weight_bytes == 3 * per_layer + 4 * (128 * 64 + 64)


def test_time_to_first_token_includes_tokenizing(tiny, monkeypatch):
    engine = engine_for(tiny())
    monkeypatch.setattr(engine, "encode", lambda prompt, chat: sleep(0.3) or prompt)
    engine.generate([[1]], SamplingParams(max_tokens=2))
    assert engine.metrics is not None
    assert engine.metrics.ttft >= 0.3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ("one string", "must be a list"),
        ([[]], "prompt 1 is empty"),
        ([[1, 128]], "token id 128; the vocabulary is 0 to 127"),
        ([[-1]], "token id -1"),
        (["text"], "no tokenizer files"),
    ],
)
def test_bad_prompts_are_refused(tiny, prompts, message):
    with pytest.raises(EngineError, match=message):
        engine_for(tiny()).generate(prompts)


def test_as_many_sampling_parameters_as_prompts(tiny):
    with pytest.raises(EngineError, match="3 sampling parameters for 2 prompts"):
        engine_for(tiny()).generate(prompts_of_ids(2, 2), [SamplingParams()] * 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "int4"}, "quantization is 'int4'; accepted are none, rowint8"),
        ({"mode": "graph"}, "mode is 'graph'; accepted are eager, compile"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"fused": True}, "fused SwiGLU is an INT8 operator"),
        ({"device": "tpu"}, "device is 'tpu'; accepted are auto, cpu, cuda"),
        ({"device": "meta"}, "device is 'meta'; accepted are auto, cpu, cuda"),
        ({"device": "cuda:99"}, "device is 'cuda:99'; torch finds"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(EngineError, match=message):
        engine_for(tmp_path, **settings)
