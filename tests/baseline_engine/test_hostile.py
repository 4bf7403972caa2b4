"""Inputs that must end in one clear line, or touch nobody else: several members of each kind."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rowint8.baseline_engine import SamplingParams
from rowint8.baseline_engine.errors import EngineError, SettingError
from rowint8.baseline_engine.extras.async_engine import AsyncEngine
from rowint8.baseline_engine.extras.command import app
from rowint8.baseline_engine.scoring import Text, score
from rowint8.kernels.quantize import quantize_rowwise
from tests.baseline_engine.harness import assert_all_memory_returned, engine_for, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny, write_tokenizer

COMMAND = [sys.executable, "-c", "from rowint8.baseline_engine.extras.cli import main; main()"]
INDEX = "model.safetensors.index.json"
HOT = 77
"""A token whose embedding makes activations overflow in fp16."""


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.fixture
def model(tmp_path):
    return write_tiny(tmp_path / "model", max_shard_size="1GB")


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("hot"), max_shard_size="1GB", tie_word_embeddings=False)

    def change(tensors):
        tensors["model.embed_tokens.weight"][HOT] = 65504  # the largest number of fp16, so that more is infinite
        tensors["model.layers.0.mlp.down_proj.weight"] *= 8
        tensors["lm_head.weight"][HOT] = 0  # it is never written

    edit(folder, change)
    return folder


SAMPLINGS = [
    {},
    {"logprobs": 2},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.5, "min_p": 0.1},
    {"repetition_penalty": 1.5},
]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_logits_that_are_not_finite_end_their_request_only(overflowing, sampling, overlap):
    """In fp32, where the tokens of the others are the same to the last bit; activations are made NaN or infinite."""
    small = {"block_size": 4, "cache_tokens": 64, "max_context": 64, "max_seqs": 3}
    engine = engine_for(overflowing, overlap=overlap, **small)
    cold, params = prompts_of_ids(9, 14, 6), SamplingParams(max_tokens=12, **({"seed": 3} | sampling))
    alone = [tokens_of(engine, [prompt], params)[0] for prompt in cold]
    assert HOT not in {token for tokens in (*cold, *alone) for token in tokens}
    for bad in (math.nan, math.inf, -math.inf):  # each time requests get the blocks of those that failed before
        engine.model.embedding.weight[HOT] = bad
        engine.forget_prefixes()
        events = []
        prompts = [cold[0], [5, HOT, 7], cold[1], [HOT] * 13, cold[2]]
        first, hot, second, hotter, third = engine.generate(prompts, params, on_token=events.append)
        assert [each.token_ids for each in (first, second, third)] == alone
        for index, failed in ((1, hot), (3, hotter)):
            assert (failed.finish_reason, failed.token_ids) == ("error", [])
            assert failed.error.startswith("the model's logits are NaN or infinite in float32; ")
            (event,) = [event for event in events if event.request == index]
            assert (event.token_id, event.finish_reason, event.error) == (None, "error", failed.error)
        assert_all_memory_returned(engine)


@pytest.mark.parametrize("quantization", ["none", "rowint8"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_what_overflows_in_fp16_says_which_dtypes_would_do(overflowing, sampling, quantization):
    engine = engine_for(overflowing, dtype="float16", quantization=quantization)
    cold, hot = engine.generate([[1, 2, 3], [5, HOT, 7]], SamplingParams(max_tokens=3, **sampling))
    assert cold.finish_reason == "length"
    assert hot.finish_reason == "error"
    assert hot.error == "the model's logits are NaN or infinite in float16; give dtype bfloat16 or float32"


def test_a_wider_dtype_runs_what_overflows(overflowing):
    for dtype in ("bfloat16", "float32"):
        (completion,) = engine_for(overflowing, dtype=dtype).generate([[5, HOT, 7]], SamplingParams(max_tokens=4))
        assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("dtype", "advice"), [("bfloat16", "give dtype float32"), ("float32", "the weights or numbers")]
)
def test_the_advice_fits_the_dtype(model, dtype, advice):
    edit(model, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(3e38))
    (completion,) = engine_for(model, dtype=dtype).generate([[1, 2]])
    assert completion.finish_reason == "error"
    assert f"in {dtype}; {advice}" in completion.error


def test_scores_are_never_nan(overflowing):
    engine = engine_for(overflowing, dtype="float16")
    with pytest.raises(EngineError, match="logits are NaN or infinite in float16"):
        score(engine, [Text([1, 2, 3, 4], 1), Text([5, HOT, 7, 8], 2)])
    assert_all_memory_returned(engine)
    assert math.isfinite(score(engine, [Text([1, 2, 3, 4], 1)])[0].logprobs[0])


def store_int8(folder, scale_of):
    """Turns the checkpoint into one of INT8 rows; `scale_of` changes the scales of one layer."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            quantized = quantize_rowwise(tensors[name])
            tensors[name], tensors[f"{name}_scale"] = quantized.values, quantized.scale
        name = "model.layers.1.mlp.up_proj.weight_scale"
        tensors[name] = scale_of(tensors[name]).half()

    edit(folder, change)
    edit_config(folder, quantization_config={"quant_method": "rowint8"})


@pytest.mark.parametrize("scale", [-1.0, -6e-8, math.nan, math.inf, -math.inf])
def test_scales_that_no_weight_has_are_refused(model, scale):
    def spoil(scales):
        scales[3] = scale
        return scales

    store_int8(model, spoil)
    with pytest.raises(EngineError, match=r"up_proj\.weight_scale: row 3 is \S+, not a finite scale"):
        engine_for(model)


@pytest.mark.parametrize("rows", [[3], [0, 1], list(range(96)), [95]], ids=str)
def test_zero_is_a_scale_of_zeros_alone(model, rows):
    def zeroed(name, within):
        return lambda tensors: tensors[name].__setitem__(within, 0)

    store_int8(model, lambda scales: scales.index_fill(0, torch.tensor(rows), 0))
    with pytest.raises(EngineError, match=rf"up_proj\.weight_scale: row {rows[0]} is 0.0, no scale of a row that"):
        engine_for(model)
    edit(model, zeroed("model.layers.1.mlp.up_proj.weight", rows))
    assert tokens_of(engine_for(model), prompts_of_ids(4), SamplingParams(max_tokens=2))


@pytest.mark.parametrize(
    "changes",
    [
        *({"num_hidden_layers": count} for count in (2, 4, 60000, 10**6, 10**30)),
        *({"vocab_size": size} for size in (127, 2**24, 10**12)),
        *({name: 2**24} for name in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")),
        {"hidden_size": 2**24, "intermediate_size": 2**24, "vocab_size": 2**24},
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_are_refused_at_once(model, changes):
    start = time.monotonic()
    with pytest.raises(EngineError) as caught:
        engine_for(edit_config(model, **changes))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", "a/../../b.safetensors", ".."])
def test_an_index_leads_nowhere_outside(tmp_path, name):
    folder = write_tiny(tmp_path / "model")
    (tmp_path / "other.safetensors").write_bytes(b"")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(EngineError, match="which is outside of the folder"):
        engine_for(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_tiny(tmp_path)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second)
    with pytest.raises(EngineError, match=f"{name} is in .*{first.name} and in {second.name}"):
        engine_for(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_head_that_cannot_be_compared_with_the_embedding_is_refused(model, dtype):
    edit(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].to(dtype)}))
    with pytest.raises(EngineError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        engine_for(model)


@pytest.mark.parametrize("as_embedding", [True, False])
def test_a_head_of_its_own_is_not_dropped_where_the_embedding_is_the_head(tmp_path, as_embedding):
    """A tied checkpoint may repeat its embedding, and nothing else, as the output layer."""
    folder = write_tiny(tmp_path, max_shard_size="10MB")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if as_embedding else embedding + 1
    save_file(tensors, folder / "model.safetensors")
    if as_embedding:
        engine_for(folder)
        return
    with pytest.raises(EngineError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        engine_for(folder)


def test_shards_without_an_index_are_named(tmp_path):
    folder = write_tiny(tmp_path)
    (folder / INDEX).unlink()
    with pytest.raises(EngineError, match=r"has model-00001-of-0000.\.safetensors, .*, but no " + INDEX):
        engine_for(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX, "shard", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_not_read(tmp_path, name, kind):
    folder = write_tiny(tmp_path)
    path = next(folder.glob("model-*")) if name == "shard" else folder / name
    path.unlink(missing_ok=True)
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda path: os.symlink("/dev/zero", path)}
    make[kind](path)
    with pytest.raises(EngineError, match=f"{path.name} is no regular file"):
        engine_for(folder)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe{}", b'"text"', b"[1]", b"null", b"{", b"", b"[" * 10**5, b'{"vocab_size": 1' + b"0" * 5000 + b"}"],
    ids=range(8),
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_a_file_that_holds_no_object_is_named(tmp_path, name, content):
    folder = write_tiny(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(EngineError, match=name) as caught:
        engine_for(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """An engine whose tokenizer has more tokens than the model."""
    folder = write_tiny(tmp_path_factory.mktemp("talker"), vocab_size=262, max_shard_size="1GB")
    assert write_tokenizer(folder, "fallback") > 262
    return engine_for(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{{ messages[7].content }}",
        "{{ 1 // 0 }}",
        "{{ messages + 3 }}",
        "{{ missing.attribute }}",
        "{{ '\\ud800' }}",
    ],
)
def test_a_template_that_fails_is_one_line(talker, monkeypatch, template):
    monkeypatch.setattr(talker.tokenizer._tokenizer, "chat_template", template)
    with pytest.raises(EngineError, match=r"the model's chat template refuses the messages|is no UTF-8 text") as caught:
        talker.generate(["the"], chat=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud800", "a\udfffb", 7, None, b"the", {"role": "user"}, 1.5, "b"])
def test_a_prompt_that_the_model_has_no_tokens_for_is_one_line(talker, prompt):
    with pytest.raises(EngineError, match=r"no UTF-8 text|a prompt is|prompt holds token id 2\d\d; the vocabulary"):
        talker.generate([prompt])
    assert_all_memory_returned(talker)


@pytest.mark.parametrize("token_id", [262, 10**30])
def test_a_stop_token_that_the_model_cannot_give_is_refused(talker, token_id):
    params = SamplingParams(max_tokens=1, stop_token_ids=(3, token_id))
    with pytest.raises(EngineError, match=rf"stop_token_ids holds {token_id}; the vocabulary is 0 to 261"):
        talker.generate(["the"], params)
    assert_all_memory_returned(talker)


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_no_context_takes_is_not_tokenized(talker, monkeypatch, chat):
    monkeypatch.setattr(talker.tokenizer, "_tokenizer", None)
    with pytest.raises(EngineError, match=r"prompt 2 has 1000000 characters; the context takes up to 127 tokens"):
        talker.make_request("x" * 1_000_000, SamplingParams(), chat=chat, index=1)


@pytest.mark.parametrize(
    "values",
    [
        *({"repetition_penalty": value} for value in (1e-40, 1e-3, 1e9, "1", None)),
        *({"logprobs": value} for value in ("3", 2.0, True, [1], 10**400)),
        *({"max_tokens": value} for value in (None, 2.0, "4", False)),
        *({"stop": value} for value in ([3], "END", [None], ["\ud800"])),
        *({"stop_token_ids": value} for value in (7, [1.5], ["a"], [-1])),
        *({"seed": value} for value in (1.0, "1", 2**64)),
        *({"temperature": value} for value in ("hot", [1.0], 10**400, 1e300, -0.5)),
    ],
    ids=lambda values: str(values)[:40],
)
def test_parameters_of_another_type_or_range_are_refused(values):
    with pytest.raises(SettingError) as caught:
        SamplingParams(**values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_streamed_is_the_text_of_the_completion(talker):
    for seed in range(20):
        events: list = []
        params = SamplingParams(max_tokens=60, temperature=20.0, seed=seed, ignore_eos=True, stop=("»»", "\n\n"))
        completions = talker.generate([[1, 5], [1, 9]], params, on_token=events.append)
        for index, completion in enumerate(completions):
            assert "".join(event.text for event in events if event.request == index) == completion.text
            if completion.finish_reason == "length":
                assert completion.text == talker.tokenizer.decode(completion.token_ids)


def test_a_tokenizer_that_panics_on_a_token_ends_the_requests_that_have_it(model):
    """Rust's Strip panics where a token has fewer characters than it takes away; that is no Exception in Python."""
    write_tokenizer(model, "bytes")
    prompts, params = prompts_of_ids(5, 7), SamplingParams(max_tokens=20, ignore_eos=True)
    engine = engine_for(model)
    first, second = tokens_of(engine, prompts, params)
    letter = engine.tokenizer._backend.id_to_token(next(token for token in first if token not in {*second, 0, 1, 2}))
    file = json.loads((model / "tokenizer.json").read_text())
    steps = [
        {"type": "Replace", "pattern": {"String": letter}, "content": "..."},
        {"type": "Strip", "content": ".", "start": 0, "stop": 9},
    ]
    file["decoder"] = {"type": "Sequence", "decoders": [*steps, file["decoder"]]}
    (model / "tokenizer.json").write_text(json.dumps(file))
    engine = engine_for(model)
    failed, other = engine.generate(prompts, params)
    assert (failed.finish_reason, other.token_ids) == ("error", second)
    assert failed.error.startswith("the tokenizer fails on the output: index out of bounds")
    assert_all_memory_returned(engine)

    async def events():
        async with AsyncEngine(engine) as served:
            return [event async for event in served.stream(prompts[0], params)]

    assert asyncio.run(asyncio.wait_for(events(), 60))[-1].error == failed.error


@pytest.mark.parametrize("how", ["closed loop", "failing listener"])
def test_a_listener_that_fails_is_alone(model, how, monkeypatch):
    engine, params = engine_for(model), SamplingParams(max_tokens=40)
    expected = tokens_of(engine, prompts_of_ids(5), params)[0]
    served = AsyncEngine(engine)
    asyncio.run(served.__aenter__())
    stream = served.stream(prompts_of_ids(7)[0], SamplingParams(max_tokens=100))
    if how == "closed loop":
        loop = asyncio.new_event_loop()
        loop.run_until_complete(anext(stream))
        loop.close()
    else:
        monkeypatch.setattr(asyncio.Queue, "put_nowait", lambda *_: 1 / 0)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)
        with pytest.raises(asyncio.TimeoutError):
            loop.run_until_complete(asyncio.wait_for(anext(stream), 0.2))
        loop.close()
        monkeypatch.undo()

    async def another():
        return [event.token_id async for event in served.stream(prompts_of_ids(5)[0], params)]

    assert asyncio.run(asyncio.wait_for(another(), 60)) == expected
    asyncio.run(served.__aexit__())
    assert_all_memory_returned(engine)


def command(*arguments, prompt="the", **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], stderr=subprocess.PIPE, timeout=120, **options)


def failed_in_one_line(result: subprocess.CompletedProcess) -> bool:
    lines = result.stderr.decode().splitlines()
    return result.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith("baseline-generate: error: ")


@pytest.fixture(scope="module")
def talking_folder(talker):
    return ["--model", talker.config.model, "--device", "cpu", "--max-tokens", "3"]


def test_the_command_fails_where_a_request_did(tmp_path):
    folder = write_tiny(tmp_path, vocab_size=300, max_shard_size="1GB")
    write_tokenizer(folder, "fallback")
    edit(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(3e38))
    prompts = ["--prompt", "the", "--prompt", "world"]
    result = CliRunner().invoke(app, ["--model", str(folder), "--device", "cpu", *prompts, "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["finish_reasons"] == ["error", "error"]
    assert "prompt 1: the model's logits are NaN or infinite in float32" in result.stderr
    assert "(2 of 2 prompts failed)" in result.stderr


def test_streams_that_are_closed_full_or_ascii(talking_folder):
    run = [*talking_folder, "--prompt", "the"]
    quoted = " ".join(map(repr, [*COMMAND, *run]))
    closed = subprocess.run(f"{quoted} >&-", shell=True, stderr=subprocess.PIPE, timeout=120)
    assert failed_in_one_line(closed)
    assert b"stdout is closed" in closed.stderr
    with open("/dev/full", "w") as full:
        assert failed_in_one_line(command(*run, stdout=full))
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    printed = command(*run, "--temperature", "9", "--seed", "3", stdout=subprocess.PIPE, env=ascii_only)
    assert printed.returncode == 0
    assert printed.stdout.isascii()


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [(["--prompt", b"caf\xe9"], b""), ([], b"\xff\xfe")],
)
def test_text_that_is_no_utf8_is_refused(talking_folder, arguments, stdin):
    assert failed_in_one_line(command(*talking_folder, *arguments, input=stdin, stdout=subprocess.PIPE))


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--model", name]
            for name in ("a" * 300, "~nobody-of-that-name/x", "/dev/null", "/proc/self/mem", "", "[bold]x")
        ),
        *(["--max-seqs", number] for number in ("0", "9" * 30)),
        *(["--cache-tokens", number] for number in ("0", "9" * 30, "9" * 12)),
        *(["--max-context", "9" * 30], ["--max-batch-tokens", "9" * 30], ["--block-size", "9" * 12]),
        *(["--memory-fraction", "nan"], ["--temperature", "inf"], ["--seed", "9" * 30], ["--stop", ""]),
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_arguments_out_of_range_are_one_line(talking_folder, arguments):
    result = CliRunner().invoke(app, [*talking_folder, "--prompt", "the", *arguments])
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("baseline-generate: error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("delay", [0.05, 0.3, 1.0, 2.0])
def test_an_interrupt_while_libraries_load_is_not_lost(talking_folder, delay):
    code = "from rowint8.baseline_engine.extras.cli import main; print(flush=True); main()"
    run = [sys.executable, "-c", code, *talking_folder, "--prompt", "the", "--max-tokens", "100", "--warmup", "1000"]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # Python itself has started
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, b"baseline-generate: interrupted\n")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_file_that_this_user_may_not_read_is_not_called_broken(model, monkeypatch, name):
    (model / "generation_config.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != name)
    with pytest.raises(EngineError, match=rf"{name} cannot be read: Permission denied$"):
        engine_for(model)
