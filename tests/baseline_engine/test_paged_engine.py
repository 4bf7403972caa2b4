"""What paging, chunking, sharing, preempting, overlapping and batching must not change: the tokens."""

import pytest

from rowint8.baseline_engine.config import SamplingParams
from tests.baseline_engine.harness import assert_all_memory_returned, engine_for, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny

PROMPTS = prompts_of_ids(2, 11, 40, 5, 25, 33)
GREEDY = SamplingParams(max_tokens=20)
SAMPLED = SamplingParams(
    max_tokens=20, temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=7
)
SETTINGS = {
    "chunks of 7 tokens": {"max_batch_tokens": 7},
    "one at a time": {"max_seqs": 1},
    "blocks of one token": {"block_size": 1},
    "blocks of 5": {"block_size": 5},
    "a cache so small that requests are preempted": {"cache_tokens": 80, "block_size": 4, "max_context": 80},
    "preempted in chunks": {"cache_tokens": 80, "block_size": 4, "max_batch_tokens": 6, "max_context": 80},
    "no prefix caching": {"prefix_caching": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(folder):
    engine = engine_for(folder)
    return {params: [tokens_of(engine, [p], params)[0] for p in PROMPTS] for params in (GREEDY, SAMPLED)}


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_tokens_are_those_of_each_request_alone(folder, expected, settings, params, overlap):
    engine = engine_for(folder, overlap=overlap, **settings)
    assert tokens_of(engine, PROMPTS, params) == expected[params]
    assert_all_memory_returned(engine)
    if "cache_tokens" in settings:
        assert engine.scheduler.num_preemptions > 0


def test_a_common_prefix_is_computed_once(folder):
    system, endings = prompts_of_ids(50)[0], prompts_of_ids(7, 9, 3, seed=2)
    prompts = [system + ending for ending in endings]
    plain = engine_for(folder, prefix_caching=False)
    expected = tokens_of(plain, prompts, GREEDY)
    engine = engine_for(folder)
    first = tokens_of(engine, prompts[:1], GREEDY)
    assert engine.scheduler.num_shared_tokens == 0
    rest = tokens_of(engine, prompts[1:], GREEDY)
    assert first + rest == expected
    assert engine.scheduler.num_shared_tokens == 2 * 48, "three full blocks of 16 for each of two"
    assert engine.metrics.steps.tokens == plain.metrics.steps.tokens - len(prompts[0]) - 19 - 2 * 48
    again = tokens_of(engine, prompts, GREEDY)
    assert again == expected
    assert_all_memory_returned(engine)


def test_a_conversation_continues_from_what_was_generated(folder):
    engine = engine_for(folder)
    prompt = prompts_of_ids(30)[0]
    answer = tokens_of(engine, [prompt], GREEDY)[0]
    follow_up = prompt + answer + prompts_of_ids(5, seed=3)[0]
    expected = tokens_of(engine_for(folder, prefix_caching=False), [follow_up], GREEDY)
    shared = engine.scheduler.num_shared_tokens
    assert tokens_of(engine, [follow_up], GREEDY) == expected
    assert engine.scheduler.num_shared_tokens - shared == 48, "full blocks of the 49 tokens computed in the first turn"


def test_a_whole_prompt_in_the_cache_still_yields_its_next_token(folder):
    engine, prompt = engine_for(folder), prompts_of_ids(32)
    first = tokens_of(engine, prompt, GREEDY)
    assert tokens_of(engine, prompt, GREEDY) == first
    assert engine.scheduler.num_shared_tokens == 16, "the second block holds the last token"


def test_sliding_windows_survive_chunks_and_preemption(tmp_path):
    from transformers import MistralConfig

    folder = write_tiny(tmp_path, MistralConfig, sliding_window=9, head_dim=16)
    alone = engine_for(folder, prefix_caching=False)
    expected = [tokens_of(alone, [prompt], GREEDY)[0] for prompt in PROMPTS]
    small = engine_for(folder, cache_tokens=80, block_size=4, max_batch_tokens=6, max_context=80)
    assert tokens_of(small, PROMPTS, GREEDY) == expected
    assert small.scheduler.num_preemptions > 0


def test_requests_enter_and_leave_while_others_run(folder, expected):
    engine = engine_for(folder, overlap=True)
    requests = []
    for index, prompt in enumerate(PROMPTS):
        requests.append(engine.add(prompt, GREEDY, index=index))
        for _ in range(3):
            engine.step()
    engine.abort(requests[4])
    while engine.has_work:
        engine.step()
    done = [engine.complete(request) for request in requests]
    assert done[4].finish_reason == "abort"
    assert done[4].token_ids == expected[GREEDY][4][: len(done[4].token_ids)]
    for index in (0, 1, 2, 3, 5):
        assert done[index].token_ids == expected[GREEDY][index]
    assert_all_memory_returned(engine)
