"""The engine for coroutines."""

import asyncio
import contextlib

import pytest

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.extras.async_engine import AsyncEngine
from tests.baseline_engine.harness import assert_all_memory_returned, engine_for, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny

PARAMS = SamplingParams(max_tokens=12)
PROMPTS = prompts_of_ids(4, 20, 9)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return engine_for(write_tiny(tmp_path_factory.mktemp("tiny")))


async def collect(served, prompt, params=PARAMS):
    return [event.token_id async for event in served.stream(prompt, params)]


def run(coroutine):
    async def limited():
        return await asyncio.wait_for(coroutine, timeout=60)

    return asyncio.run(limited())


def test_streams_run_together_and_give_what_generate_gives(engine):
    expected = tokens_of(engine, PROMPTS, PARAMS)

    async def main():
        async with AsyncEngine(engine) as served:
            return await asyncio.gather(*(collect(served, prompt) for prompt in PROMPTS))

    assert run(main()) == expected
    assert_all_memory_returned(engine)


def test_leaving_a_stream_aborts_its_request_and_no_other(engine):
    expected = tokens_of(engine, PROMPTS[1:2], PARAMS)[0]

    async def leave(served):
        async with contextlib.aclosing(served.stream(PROMPTS[0], SamplingParams(max_tokens=100))) as stream:
            async for _ in stream:
                break

    async def main():
        async with AsyncEngine(engine) as served:
            _, tokens = await asyncio.gather(leave(served), collect(served, PROMPTS[1]))
            return tokens

    assert run(main()) == expected
    assert_all_memory_returned(engine)


def test_a_bad_prompt_disturbs_nobody(engine):
    async def main():
        async with AsyncEngine(engine) as served:
            with pytest.raises(EngineError, match="token id 999"):
                await collect(served, [999])
            return await collect(served, PROMPTS[0])

    assert run(main()) == tokens_of(engine, PROMPTS[:1], PARAMS)[0]


def test_a_failing_engine_is_reported_to_whoever_waits(tmp_path, monkeypatch):
    engine = engine_for(write_tiny(tmp_path))

    def fail(chunks):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.runner, "launch", fail)

    async def main():
        async with AsyncEngine(engine) as served:
            with pytest.raises(EngineError, match="the engine failed: device lost"):
                await collect(served, PROMPTS[0])
            with pytest.raises(EngineError, match="the engine is not running"):
                await collect(served, PROMPTS[0])

    run(main())


def test_stopping_ends_the_streams_that_still_run(engine):
    async def main():
        async with AsyncEngine(engine) as served:
            waiting = asyncio.create_task(collect(served, PROMPTS[0], SamplingParams(max_tokens=100)))
            stream = served.stream(PROMPTS[1], SamplingParams(max_tokens=100))
            await anext(stream)
        with pytest.raises(EngineError, match="the engine was stopped"):
            await waiting
        with pytest.raises(EngineError, match="the engine was stopped"):
            [event async for event in stream]

    run(main())
    assert_all_memory_returned(engine)
    assert tokens_of(engine, PROMPTS[:1], PARAMS)
