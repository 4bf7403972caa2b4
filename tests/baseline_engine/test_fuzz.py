"""Random attempts to break the small engine, from fixed seeds: each ends in one clear line or in the right tokens.

ROWINT8_FUZZ_SECONDS sets how long all of them together take at least; CI takes the default.
"""

import asyncio
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path
from time import monotonic

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import rowint8.baseline_engine
from rowint8.baseline_engine import EngineConfig, SamplingParams
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.extras.async_engine import AsyncEngine
from rowint8.baseline_engine.tokenizer import Tokenizer
from tests.baseline_engine.harness import assert_all_memory_returned, engine_for, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny, write_tokenizer

FUZZERS = 7
SECONDS = float(os.environ.get("ROWINT8_FUZZ_SECONDS", "21")) / FUZZERS
SHAPE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "max_shard_size": "1GB"}
TINY = SHAPE | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SMALL_CACHE = {"block_size": 2, "cache_tokens": 40, "max_context": 40, "max_batch_tokens": 9, "max_seqs": 3}
INDEX = "model.safetensors.index.json"

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
NUMBERS = [0, 1, -1, 2, 7, 16, 2.5, 1e-6, -0.5, 1e-40, 1e300, math.nan, math.inf, 10**6, 10**12, 10**30, 10**400]
NESTED = [[], [1], [2, 3], ["x"], {}, {"a": {"b": [1]}}, [[[[1]]]]]
VALUES = [None, True, False, "", "x", "16", "caf\udce9", *NUMBERS, *NESTED]
CONFIG_VALUES = [
    *VALUES,
    *(
        "silu",
        "gelu",
        "float16",
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
    ),
    *({"rope_type": "yarn", "factor": 4.0}, {"rope_theta": 777.0}, {"type": "linear", "factor": 2.0}),
    *({"rope_type": "llama3", **LLAMA3}, {"type": "llama3", "rope_theta": 300.0, **LLAMA3}),
    *({"rope_type": "default", "factor": 2.0}, {"rope_type": "default", "partial_rotary_factor": 0.5}),
    {"full_attention": {"rope_type": "default", "rope_theta": 99.0}, "sliding_attention": {"rope_theta": 1.0}},
]
CONFIG_KEYS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling"),
    *("rope_parameters", "partial_rotary_factor", "original_max_position_embeddings", "layer_types", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "tie_word_embeddings", "eos_token_id"),
    *("dtype", "torch_dtype", "quantization_config", "architectures"),
]


def attempts(seed: int):
    """The same random numbers at each attempt's turn, for a share of the seconds and at least five times."""
    rng, end, count = random.Random(seed), monotonic() + SECONDS, 0
    while count < 5 or monotonic() < end:
        yield rng
        count += 1


def assert_one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert 10 < len(str(error)) < 1000


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    root, window = tmp_path_factory.mktemp("families"), {"sliding_window": 8}
    qwen = {"use_sliding_window": True, "max_window_layers": 0, **window}
    families = {LlamaConfig: {}, MistralConfig: window, Qwen2Config: {}, Qwen3Config: {"head_dim": 16, **qwen}}
    return [write_tiny(root / kind.__name__, kind, **(SHAPE | more)) for kind, more in families.items()]


def test_a_mutated_config_is_refused_or_means_what_it_means_to_transformers(folders, tmp_path):
    prompt, equal = prompts_of_ids(30), 0
    for rng in attempts(1):
        folder = shutil.copytree(rng.choice(folders), tmp_path / "model", dirs_exist_ok=True)
        clean = json.loads((folder / "config.json").read_text())
        config = dict(clean)
        for key in rng.sample(CONFIG_KEYS, rng.randint(1, 3)):
            config[key] = rng.choice(CONFIG_VALUES)
        for key in rng.sample(sorted(config), rng.randint(0, 1)):
            del config[key]
        (folder / "config.json").write_text(json.dumps(config))
        try:
            engine = engine_for(folder, max_context=None)
            (completion,) = engine.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        except EngineError as error:
            assert_one_line(error)
            continue
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            options = {
                "max_new_tokens": 4,
                "min_new_tokens": 4,
                "pad_token_id": 0,
                "eos_token_id": None,
                "use_cache": False,
            }
            theirs = model.generate(torch.tensor(prompt), do_sample=False, **options)[0, 30:].tolist()
        except Exception:  # it refuses what does not matter for the model, too
            continue
        if completion.finish_reason != "error":
            changed = {
                key: config.get(key, "deleted") for key in {**clean, **config} if config.get(key) != clean.get(key)
            }
            assert completion.token_ids == theirs, (folder.name, str(changed)[:300])
            equal += 1
    assert equal


def test_a_mutated_checkpoint_is_refused_or_runs(tmp_path):
    clean = write_tiny(tmp_path / "clean", **(SHAPE | {"max_shard_size": "20KB"}))
    for rng in attempts(2):
        folder = shutil.copytree(clean, tmp_path / "model", dirs_exist_ok=True)
        path = rng.choice([*sorted(folder.glob("*.safetensors")), folder / INDEX])
        content = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(content), rng.choice([8, 400, 10**6])))
            content[at] = rng.choice([0, 0xFF, ord('"'), ord("9"), rng.randrange(256)])
        path.write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            engine = engine_for(folder)
        except EngineError as error:
            assert_one_line(error)
            continue
        (completion,) = engine.generate(prompts_of_ids(5), SamplingParams(max_tokens=2))
        assert completion.finish_reason in ("length", "error")


def mutate_index(rng: random.Random, weight_map: dict) -> object:
    name = rng.choice(sorted(weight_map))
    outside = ["../x.safetensors", "/etc/passwd", "a/../../x.safetensors", ".", "", INDEX, "\0"]
    return rng.choice([weight_map | {name: rng.choice([*outside, *VALUES])}, *VALUES])


def test_a_mutated_index_is_refused_or_runs(tmp_path):
    folder = write_tiny(tmp_path, **(SHAPE | {"max_shard_size": "20KB"}))
    clean = json.loads((folder / INDEX).read_text())
    for rng in attempts(3):
        index = clean | {"weight_map": mutate_index(rng, clean["weight_map"])}
        (folder / INDEX).write_text(json.dumps(index))
        try:
            engine = engine_for(folder)
        except EngineError as error:
            assert_one_line(error)
            continue
        assert engine.generate(prompts_of_ids(5), SamplingParams(max_tokens=2))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """An engine with a byte-fallback tokenizer, whose last tokens the model has no row for."""
    folder = write_tiny(tmp_path_factory.mktemp("talker"), vocab_size=270, **TINY)
    assert write_tokenizer(folder, "fallback") > 270
    return engine_for(folder, **SMALL_CACHE)


def test_mutated_arguments_are_refused_and_disturb_nobody(talker):
    prompts, params = prompts_of_ids(4, 9), SamplingParams(max_tokens=4)
    expected = tokens_of(talker, prompts, params)
    fields = [(kind, name) for kind in (SamplingParams, EngineConfig) for name in kind.__dataclass_fields__]
    texts = ["", "the", "界", "caf\udce9", "▁▁", "\0", "<s>", "▁" * 9]
    messages = [[{"role": "user"}], [{"content": 3}], [{}], [{"role": "user", "content": "a"}, 5], {"role": "user"}]
    for rng in attempts(4):
        running = talker.add(prompts[0], params)
        talker.step()
        kind, name = rng.choice(fields)
        value = rng.choice([*VALUES, (1, "x"), b"x", object(), ["END"], (7,)])
        prompt = rng.choice([*VALUES, *texts, *messages, [rng.randrange(-2, 300) for _ in range(rng.randint(0, 60))]])
        try:
            given = kind(**({"model": "m"} if kind is EngineConfig else {"max_tokens": 3}) | {name: value})
            other = given if kind is SamplingParams and rng.random() < 0.8 else SamplingParams(max_tokens=3)
            talker.generate(
                rng.choice([[prompt], [prompt], prompt]), rng.choice([other, [other], value]), chat=rng.random() < 0.2
            )
        except EngineError as error:
            assert_one_line(error)
        while talker.has_work:
            talker.step()
        assert talker.complete(running).token_ids == expected[0]
        assert_all_memory_returned(talker)


class InterruptAt:
    """Raises KeyboardInterrupt at the `at`-th event of a trace through the engine's own files."""

    HERE = str(Path(rowint8.baseline_engine.__file__).parent)

    def __init__(self, at: float):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.HERE):
            return None
        self.seen += 1
        if self.seen == self.at:
            raise KeyboardInterrupt
        return self

    def run(self, call) -> None:
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            assert self.seen >= self.at
        finally:
            sys.settrace(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised in a generator's end
@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupt_anywhere_leaves_no_request_and_no_memory(tmp_path, overlap):
    engine = engine_for(write_tiny(tmp_path, **TINY), overlap=overlap, **SMALL_CACHE)
    prompts = prompts_of_ids(2, 11, 20, 5)
    params = [SamplingParams(max_tokens=6, temperature=1.0, seed=seed, repetition_penalty=1.1) for seed in range(4)]
    expected = tokens_of(engine, prompts, params)
    assert engine.scheduler.num_preemptions > 0
    whole = InterruptAt(math.inf)
    whole.run(lambda: engine.generate(prompts, params))
    for rng in attempts(5 + overlap):
        InterruptAt(rng.randint(1, whole.seen)).run(lambda: engine.generate(prompts, params))
        assert_all_memory_returned(engine)
        if rng.random() < 0.2:
            assert tokens_of(engine, prompts, params) == expected


def test_aborted_and_abandoned_streams_disturb_nobody(tmp_path):
    engine = engine_for(write_tiny(tmp_path, **TINY), **SMALL_CACHE)
    prompts, params = prompts_of_ids(2, 11, 20, 5), SamplingParams(max_tokens=6, temperature=1.0, seed=3)
    expected = [tokens_of(engine, [prompt], params)[0] for prompt in prompts]

    async def whole(served, which):
        assert [event.token_id async for event in served.stream(prompts[which], params)] == expected[which]

    async def left(served, which, after):
        stream = served.stream(prompts[which], params)
        async for _ in stream:
            after -= 1
            if after <= 0:
                break
        await stream.aclose()

    async def refused(served):
        with pytest.raises(EngineError):
            await anext(served.stream([10**9], params))

    async def serve(rng):
        async with AsyncEngine(engine) as served:
            stay = [asyncio.create_task(whole(served, rng.randrange(4))) for _ in range(3)]
            go = [asyncio.create_task(left(served, rng.randrange(4), rng.randint(1, 9))) for _ in range(3)]
            go += [asyncio.create_task(refused(served))]
            cancelled = asyncio.create_task(whole(served, rng.randrange(4)))
            await asyncio.sleep(rng.uniform(0, 0.02))
            cancelled.cancel()
            await asyncio.gather(*stay, *go)

    for rng in attempts(7):
        asyncio.run(asyncio.wait_for(serve(rng), timeout=60))
        assert_all_memory_returned(engine)


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
def test_the_streamed_text_is_the_decoded_text(tmp_path, kind):
    size = write_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(tmp_path)
    for rng in range(3000):
        rng = random.Random(rng)
        ids = [rng.randrange(rng.choice([3, size]) if rng.random() < 0.1 else size) for _ in range(rng.randint(1, 40))]
        stream = tokenizer.stream()
        assert "".join(map(stream.step, ids)) + stream.flush() == tokenizer.decode(ids)
