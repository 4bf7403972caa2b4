"""What the tests of the vLLM plugin share: engines in processes of their own, tiny models, and what they should say."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from rowint8.kernels.activations import ROTATED_BY, rotation_block
from rowint8.kernels.quantize import dequantize, quantize_rowwise

ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
LLM = {
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "dtype": "float32",
    "num_gpu_blocks_override": 64,
}
TINY = {**LLM, "skip_tokenizer_init": True}
SAMPLING = {"temperature": 0.0, "max_tokens": 16, "logprobs": 3, "prompt_logprobs": 3, "ignore_eos": True}
PROMPTS = [[1, 5, 9, 23, 77, 30], [4, 100, 3], [90]]
A8 = {"activations": "int8"}
FLIPS = 0.1
"""What a few activations that round to the other neighbour change in a log-probability of a tiny random model."""


def options(**chosen) -> dict:
    """`LLM` arguments for quantizing a tiny model while it loads, with these options."""
    config = {"quant_method": "rowint8", "serialized": False, **chosen}
    return {**TINY, "hf_overrides": {"quantization_config": config}}


def caches_in(folder: Path) -> dict[str, str]:
    """Environment of a driver whose first engine compiles, whatever was compiled on this machine before.

    Drivers with folders side by side share what Inductor compiled of the same graphs.
    """
    return {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "inductor")}


class Driver:
    """A process that runs one engine after another (see vllm_driver.py), and another one where it died.

    `env` is added to its environment.
    """

    def __init__(self, log: Path, **env: str) -> None:
        plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.log, self.env = log, plain | ENV | env
        self.process = self.start()

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, Path(__file__).with_name("vllm_driver.py")],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
        )

    def run(self, model: Path, prompts=PROMPTS, sampling=SAMPLING, llm=TINY, **job) -> dict:
        if self.process.poll() is not None:
            self.process = self.start()
        llm = {"quantization": "rowint8", **llm}
        job |= {"model": str(model), "prompts": prompts, "sampling": sampling, "llm": llm}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the driver died: {self.log.read_text()[-3000:]}"
        return json.loads(line)

    def works(self, model: Path, **job) -> dict:
        result = self.run(model, **job)
        assert "error" not in result, result["error"]
        return result

    def saves_and_loads(self, model: Path, folder: Path, **job) -> dict:
        """What an engine says that loads, from a new folder, what another one wrote by `save_sharded_state`."""
        folder.mkdir()
        shutil.copy(model / "config.json", folder)
        self.works(model, save=str(folder), **job)
        llm = {**job.pop("llm", TINY), "load_format": "sharded_state"}
        return self.works(folder, llm=llm, **job)

    def fails(self, model: Path, **job) -> str:
        return self.run(model, **job)["error"]

    def stop(self) -> None:
        self.process.communicate(timeout=60)


def make_tiny(folder: Path, config_class=LlamaConfig, max_shard_size="50GB", **options) -> Path:
    """A random fp32 model of two layers with GQA and, where the architecture has them, non-zero biases."""
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    untied = {"initializer_range": 0.2, "tie_word_embeddings": False}
    config = config_class(**shape | heads | untied | options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edited_copy(source: Path, folder: Path, edit, metadata: dict | None = None) -> Path:
    """A copy of a checkpoint whose tensors went through `edit(dict)` in place."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"} | (metadata or {}))
    return folder


def with_other_numbers(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose projections and experts have their rows in another order."""

    def flip(tensors):
        for name in tensors:
            if "_proj." in name or ".experts." in name:
                tensors[name] = tensors[name].flip(0)

    return edited_copy(source, folder, flip)


def prequantized(
    source: Path, folder: Path, edit=lambda tensors: None, also: tuple[str, ...] = (), largest_block: int | None = None
) -> Path:
    """A rowint8 checkpoint of `source`, the weights `also` quantized too, its tensors then changed by `edit`.

    With a `largest_block` it is one for INT8 activations.
    """

    def quantize(tensors):
        for name in [*also, *(name for name in tensors if name.endswith("_proj.weight"))]:
            block = rotation_block(tensors[name].shape[1], largest_block) if largest_block else 1
            tensors[name], tensors[f"{name}_scale"] = quantize_rowwise(tensors[name], block=block)
        edit(tensors)

    edited_copy(source, folder, quantize, {ROTATED_BY: str(largest_block)} if largest_block else None)
    config = json.loads((folder / "config.json").read_text())
    rotation = {"activations": "int8", "rotation_block": largest_block} if largest_block else {}
    config["quantization_config"] = {"quant_method": "rowint8"} | rotation
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def oracle(folder: Path, lm_head: bool = False, model_class=AutoModelForCausalLM):
    """The transformers model in fp32, its linear layers and experts (and the head) rounded to INT8 and back."""
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    unquantized = ("shared_expert_gate", "score", *([] if lm_head else ["lm_head"]))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(unquantized):
            module.weight.data = dequantize(quantize_rowwise(module.weight.data))
        elif name.endswith(".experts"):
            for parameter in module.parameters():
                rounded = dequantize(quantize_rowwise(parameter.data.flatten(0, 1)))
                parameter.data = rounded.view(parameter.shape)
    return model


def assert_follows(result: dict, prompts: list[list[int]], logits) -> None:
    """Greedy tokens and every reported logprob are those of `logits(token ids [1, T]) -> [1, T, vocabulary]`."""
    rows = zip(prompts, result["token_ids"], result["prompt_logprobs"], result["logprobs"], strict=True)
    for prompt, tokens, prompt_logprobs, logprobs in rows:
        with torch.inference_mode():
            expected = logits(torch.tensor([prompt + tokens[:-1]]))[0].log_softmax(-1)
        assert tokens == expected[len(prompt) - 1 :].argmax(-1).tolist()
        assert len(logprobs) == len(tokens)
        reported = prompt_logprobs + logprobs
        for row, position in zip(expected[-len(reported) :], reported, strict=True):
            assert position == pytest.approx({token: float(row[int(token)]) for token in position}, abs=2e-4)


def assert_loaded_layer_by_layer(memory: dict, layer_bytes: int) -> None:
    """Loading never took more than a tenth beyond the final weights, and one layer as the checkpoint has it."""
    assert memory["final"] < memory["peak"] <= 1.1 * memory["final"] + layer_bytes


def assert_close(logprobs: list, expected: list, abs: float = 2e-4) -> None:
    for ours, theirs in zip(logprobs, expected, strict=True):
        for position, reference in zip(ours, theirs, strict=True):
            assert position == pytest.approx(reference, abs=abs)
