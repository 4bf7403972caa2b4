"""Requests through the engine: ends, streams, logprobs, errors, metrics."""

import math
from time import sleep

import pytest
import torch

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.tokenizer import TextOutput
from tests.baseline_engine.harness import assert_all_memory_returned, engine_for, prompt_logits, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder):
    return engine_for(folder)


@pytest.fixture(scope="module")
def talker(smollm2):
    return engine_for(smollm2, dtype="auto")


def test_requests_of_one_batch_may_differ_in_every_parameter(engine):
    prompts = prompts_of_ids(6, 6)
    params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=9, temperature=2.0, seed=1)]
    together = tokens_of(engine, prompts, params)
    assert [len(tokens) for tokens in together] == [3, 9]
    pairs = zip(prompts, params, strict=True)
    assert together == [tokens_of(engine, [prompt], param)[0] for prompt, param in pairs]


def test_stops_at_the_end_of_sequence_token(tmp_path, engine):
    prompt = prompts_of_ids(8)
    free = tokens_of(engine, prompt, SamplingParams(max_tokens=16))[0]
    eos = next(token for token in free if token != free[0])
    until = free[: free.index(eos) + 1]
    stopping = engine_for(write_tiny(tmp_path, eos_token_id=[127, eos] if eos != 127 else eos))
    stopped = stopping.generate(prompt, SamplingParams(max_tokens=16))[0]
    assert (stopped.token_ids, stopped.finish_reason) == (until, "stop")
    ignored = stopping.generate(prompt, SamplingParams(max_tokens=16, ignore_eos=True))[0]
    assert (ignored.token_ids, ignored.finish_reason) == (free, "length")
    asked = engine.generate(prompt, SamplingParams(max_tokens=16, stop_token_ids=(eos,)))[0]
    assert (asked.token_ids, asked.finish_reason) == (until, "stop")


def test_output_ends_with_the_context(tmp_path):
    engine = engine_for(write_tiny(tmp_path, max_position_embeddings=32))
    completion = engine.generate(prompts_of_ids(20), SamplingParams(max_tokens=100))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (12, "length")
    with pytest.raises(EngineError, match="prompt 2 has 32 tokens; the context takes up to 31"):
        engine.generate(prompts_of_ids(4, 32))
    assert len(engine.generate(prompts_of_ids(31), SamplingParams())[0].token_ids) == 1
    assert_all_memory_returned(engine)


def test_streams_every_token_and_the_whole_text(talker):
    events = []
    prompts = ["Write three emoji and a word in Chinese.", "Say hello."]
    params = SamplingParams(max_tokens=48, temperature=1.2, seed=3)
    completions = talker.generate(prompts, params, chat=True, on_token=events.append)
    for index, completion in enumerate(completions):
        mine = [event for event in events if event.request == index]
        assert [event.token_id for event in mine] == completion.token_ids
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == completion.finish_reason
        streamed = "".join(event.text for event in mine)
        assert streamed == completion.text


def test_a_stop_string_ends_the_text_before_it(talker):
    prompt = ["The capital of France is"]
    free = talker.generate(prompt, SamplingParams(max_tokens=24))[0]
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 5]
    cut = free.text.index(stop)
    events = []
    params = SamplingParams(max_tokens=24, stop=("never said", stop))
    stopped = talker.generate(prompt, params, on_token=events.append)[0]
    assert (stopped.text, stopped.finish_reason) == (free.text[:cut], "stop")
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < len(free.token_ids)
    assert "".join(event.text for event in events) == stopped.text, "no part of the stop string is ever shown"


class Letters:
    def step(self, token_id):
        return chr(token_id)

    def flush(self):
        return ""


def test_text_that_may_begin_a_stop_string_is_held_back():
    output, shown = TextOutput(Letters(), ["END", "stop"]), []
    for letter in "a EN b ENDED":
        if output.push(ord(letter)):
            break
        shown.append(output.take(last=False))
    assert shown == ["a", " ", "", "", "EN ", "b", " ", "", ""]
    assert (output.take(last=True), output.text) == ("", "a EN b ")
    never = TextOutput(Letters(), ["END"])
    never.push(ord("E"))
    assert (never.take(last=True), never.close(), never.text) == ("E", False, "E")


def test_stream_joins_characters_cut_across_tokens(talker):
    text = " naïve 日本語 🙂🏽 end"
    ids, stream = talker.tokenizer.encode(text), talker.tokenizer.stream()
    pieces = [stream.step(token) for token in ids]
    assert "" in pieces, "the text should need more than one token for some character"
    assert "".join(pieces) == text


def test_chat_puts_the_prompt_into_the_template(talker):
    hello = talker.encode("Hello", chat=True)
    with_template = talker.tokenizer._tokenizer.decode(hello)
    assert "<|im_start|>user\nHello<|im_end|>" in with_template
    assert with_template.endswith("<|im_start|>assistant\n")
    assert talker.encode([{"role": "user", "content": "Hello"}]) == hello
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert "<|im_start|>system\nBe brief.<|im_end|>" in talker.tokenizer._tokenizer.decode(talker.encode(messages))


def test_logprobs_are_those_of_the_logits(engine):
    (prompt, other) = prompts_of_ids(9, 5)
    params = [SamplingParams(max_tokens=4, logprobs=3), SamplingParams(max_tokens=4)]
    completion, silent = engine.generate([prompt, other], params)
    assert silent.logprobs is None
    expected = prompt_logits(engine, prompt + completion.token_ids[:-1]).log_softmax(-1)[len(prompt) - 1 :]
    for row, token, reported in zip(expected, completion.token_ids, completion.logprobs, strict=True):
        assert reported.chosen == pytest.approx(float(row[token]), abs=1e-4)
        top = row.topk(3)
        assert list(reported.top) == top.indices.tolist()
        assert list(reported.top.values()) == pytest.approx(top.values.tolist(), abs=1e-4)


def test_metrics_of_a_run(folder):
    engine = engine_for(folder, quantization="rowint8")
    completions = engine.generate(prompts_of_ids(4, 9), SamplingParams(max_tokens=5))
    metrics = engine.metrics
    assert [request.prompt_tokens for request in metrics.requests] == [4, 9]
    assert metrics.output_tokens == sum(len(completion.token_ids) for completion in completions) == 10
    assert all(0 < request.ttft < metrics.wall for request in metrics.requests)
    assert metrics.load_seconds > 0
    assert (metrics.steps.steps, metrics.steps.tokens) == (5, 4 + 9 + 4 * 2), "the last token is never computed"
    busy = sum(seconds for part, seconds in metrics.steps.seconds.items() if part != "wait")
    assert (len(metrics.steps.host), sum(metrics.steps.host)) == (5, pytest.approx(busy))
    slots = [(4 + step + 9 + step) / 32 for step in range(5)]
    assert metrics.steps.kv_waste == pytest.approx(1 - sum(slots) / 5)
    rows = 64 + 32 + 32 + 64 + 2 * 96  # q, k, v, o, gate and up, all with K = 64; down is [64, 96]
    per_layer = 64 * rows + 64 * 96 + 2 * (rows + 64) + 4 * 2 * 64
    assert metrics.weight_bytes == 3 * per_layer + 4 * (128 * 64 + 64)


def test_time_to_first_token_includes_tokenizing(engine, monkeypatch):
    monkeypatch.setattr(engine, "encode", lambda prompt, chat: sleep(0.3) or prompt)
    engine.generate([[1]], SamplingParams(max_tokens=2))
    assert engine.metrics.ttft >= 0.3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ("one string", "must be a list"),
        ([[]], "prompt 1 is empty"),
        ([[1, 128]], "token id 128; the vocabulary is 0 to 127"),
        ([[-1]], "token id -1"),
        ([[1.5]], "token id 1.5"),
        (["text"], "no tokenizer files"),
        ([[{"role": "user", "content": "text"}]], "no tokenizer files"),
    ],
)
def test_bad_prompts_are_refused(engine, prompts, message):
    with pytest.raises(EngineError, match=message):
        engine.generate(prompts)
    assert_all_memory_returned(engine)


def test_stop_strings_need_a_tokenizer(engine):
    with pytest.raises(EngineError, match="no tokenizer files, which stop strings need; give stop_token_ids"):
        engine.generate([[1]], SamplingParams(stop=("a",)))


def test_as_many_sampling_parameters_as_prompts(engine):
    with pytest.raises(EngineError, match="3 sampling parameters for 2 prompts"):
        engine.generate(prompts_of_ids(2, 2), [SamplingParams()] * 3)


def test_a_refused_request_leaves_the_others_alone(engine):
    expected = tokens_of(engine, prompts_of_ids(6), SamplingParams(max_tokens=8))[0]
    request = engine.add(prompts_of_ids(6)[0], SamplingParams(max_tokens=8))
    engine.step()
    for bad in ([], [999], list(range(128)) * 2):
        with pytest.raises(EngineError):
            engine.add(bad, SamplingParams())
    while engine.has_work:
        engine.step()
    assert engine.complete(request).token_ids == expected


def test_running_out_of_memory_fails_the_largest_request_only(engine, monkeypatch):
    prompts, params = prompts_of_ids(5, 40, 6), SamplingParams(max_tokens=6)
    expected = tokens_of(engine, prompts, params)
    launch = engine.runner.launch

    def launch_small(chunks):
        if sum(chunk.count for chunk in chunks) > 20:
            raise torch.OutOfMemoryError("tried to allocate 7 GiB\nmore lines")
        return launch(chunks)

    engine.forget_prefixes()
    monkeypatch.setattr(engine.runner, "launch", launch_small)
    events = []
    first, second, third = engine.generate(prompts, params, on_token=events.append)
    assert [first.token_ids, third.token_ids] == [expected[0], expected[2]]
    assert (second.token_ids, second.finish_reason) == ([], "error")
    assert second.error == "out of memory: tried to allocate 7 GiB"
    assert [event.token_id for event in events if event.finish_reason == "error"] == [None]
    assert engine.metrics.requests[1].ttft is None
    assert math.isfinite(engine.metrics.ttft)
    assert_all_memory_returned(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_interrupting_returns_the_memory(folder, overlap):
    engine, seen = engine_for(folder, overlap=overlap), []

    def interrupt(event):
        seen.append(event)
        if len(seen) == 5:
            raise KeyboardInterrupt

    prompts, params = prompts_of_ids(20, 20), SamplingParams(max_tokens=30)
    expected = tokens_of(engine, prompts, params)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, params, on_token=interrupt)
    assert_all_memory_returned(engine)
    assert tokens_of(engine, prompts, params) == expected
