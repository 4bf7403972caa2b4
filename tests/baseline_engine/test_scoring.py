"""rowint8.baseline_engine.scoring: log-probabilities of given tokens, whatever they are computed together with."""

import pytest
import torch

from rowint8.baseline_engine.config import SamplingParams
from rowint8.baseline_engine.errors import EngineError
from rowint8.baseline_engine.scoring import Text, score
from tests.baseline_engine.harness import assert_all_memory_returned, engine_for, load_transformers, tokens_of
from tests.tiny_models import prompts_of_ids, write_tiny

TEXTS = [
    Text(ids, start) for ids, start in zip(prompts_of_ids(2, 11, 40, 5, 97, 33), (1, 10, 1, 3, 60, 20), strict=True)
]
SETTINGS = {
    "together": {},
    "chunks of 7 tokens": {"max_batch_tokens": 7},
    "logits of two tokens at a time": {"max_seqs": 2},
    "blocks of 5": {"block_size": 5},
    "a cache for one": {"cache_tokens": 100, "block_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(folder):
    """(logprobs, greedy) of each text alone, by transformers."""
    model, found = load_transformers(folder), []
    for tokens, start in TEXTS:
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, start - 1 : -1].double().log_softmax(-1)
        targets = torch.tensor(tokens[start:])
        found.append((logprobs.gather(1, targets[:, None])[:, 0].tolist(), (logprobs.argmax(-1) == targets).tolist()))
    return found


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_scores_are_those_of_each_text_alone(folder, expected, settings):
    engine = engine_for(folder, **settings)
    for found, (logprobs, greedy) in zip(score(engine, TEXTS), expected, strict=True):
        assert found.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert found.greedy == greedy
    assert_all_memory_returned(engine)


def test_generated_tokens_are_the_likeliest(folder):
    engine = engine_for(folder)
    prompt = prompts_of_ids(9)[0]
    (tokens,) = tokens_of(engine, [prompt], SamplingParams(max_tokens=12))
    (found,) = score(engine, [Text(prompt + tokens, len(prompt))])
    assert found.greedy == [True] * 12
    other = [*prompt, (tokens[0] + 1) % 128]
    assert score(engine, [Text(other, len(prompt))])[0].greedy == [False]


def test_scoring_leaves_the_engine_as_it_was(folder):
    """Blocks that the prefix cache would find again are taken; what it finds afterwards must be right."""
    engine = engine_for(folder, cache_tokens=100, block_size=4)
    prompts, params = prompts_of_ids(30, 41), SamplingParams(max_tokens=8)
    first = tokens_of(engine, prompts, params)
    score(engine, TEXTS)
    assert tokens_of(engine, prompts, params) == first


def test_errors_name_the_text(folder):
    engine = engine_for(folder, max_context=20)
    for text, message in (
        (Text([1, 2, 3], 0), r"text 2 starts at 0 of 3; give 1 to"),
        (Text([1, 2, 3], 3), r"text 2 starts at 3 of 3"),
        (Text([1] * 21, 1), r"prompt 2 has 20 tokens; the context takes up to 19"),
        (Text([1, 128, 2], 1), r"token id 128; the vocabulary is 0 to 127"),
        (Text([1, 2, 128], 1), r"token id 128; the vocabulary is 0 to 127"),
    ):
        with pytest.raises(EngineError, match=message):
            score(engine, [Text([1, 2], 1), text])
        assert_all_memory_returned(engine)
    request = engine.add([1, 2, 3], SamplingParams())
    with pytest.raises(EngineError, match="the engine has requests"):
        score(engine, TEXTS[:1])
    engine.abort(request)
