"""What the tests of the small engine share."""

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rowint8.baseline_engine.attention import Layout
from rowint8.baseline_engine.config import EngineConfig
from rowint8.baseline_engine.engine import Engine
from rowint8.kernels.quantize import dequantize, quantize_rowwise


def engine_for(folder, **settings) -> Engine:
    return Engine(EngineConfig(str(folder), **({"dtype": "float32", "device": "cpu"} | settings)))


def tokens_of(engine: Engine, prompts, params) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(prompts, params)]


def assert_all_memory_returned(engine: Engine) -> None:
    engine.scheduler.pool.check([])
    assert not engine.has_work


def load_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy_of_transformers(model, ids: list[int], tokens: int) -> list[int]:
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def round_linears_(model) -> None:
    """Replaces every decoder linear weight by what INT8 rows hold of it."""
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = dequantize(quantize_rowwise(module.weight.data, name=name))


def prompt_logits(engine: Engine, ids: list[int]) -> Tensor:
    """fp32 [tokens, vocabulary] of a prompt, computed in the first blocks of the engine's cache."""
    cache, count = engine.runner.cache, len(ids)
    blocks = range(1, 1 - (-count // cache.block_size))
    one = torch.tensor([count], dtype=torch.int32)
    layout = Layout(torch.tensor([0, count]).int(), one, torch.tensor([list(blocks)]).int(), [count], [count])
    positions = torch.arange(count)
    with torch.inference_mode():
        attend = engine.runner.attention.plan(layout)
        hidden = engine.model(torch.tensor(ids), positions, positions + cache.block_size, cache, attend)
        return engine.model.logits(hidden).float()
