"""What config.json may say, declared once: types, ranges, and the defaults that transformers has for each family.

What the file says and the engine does not do is refused by name. Fields that are not declared change nothing in these
families.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import Ge, Gt, Interval, MaxLen
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rowint8.baseline_engine.errors import describe, one_line, shown
from rowint8.baseline_engine.files import read_json
from rowint8.kernels.activations import BLOCKS, LARGEST_BLOCK

_Size = Annotated[int, Interval(ge=1, le=2**24)]
"""A dimension of a weight. Products of two stay far below 2^63."""
_Positive = Annotated[float, Gt(0)]
_Context = Annotated[int, Interval(ge=1, le=2**31 - 1)]
_Window = Annotated[int, Interval(ge=1, le=2**31 - 1)]
_Ids = int | list[int] | None
_Parsed = TypeVar("_Parsed", bound=BaseModel)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary positions to a longer context; see `layers.rope_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class StoredInt8:
    """Linear weights that the checkpoint holds as INT8 rows."""

    rotation: int | None
    """Where the rows are rotated, for INT8 activations: the largest block of columns that are rotated together."""


@dataclass(frozen=True)
class ExpertsConfig:
    """The experts in place of the MLP; see `experts`."""

    count: int
    topk: int
    """How many a token goes through."""
    intermediate_size: int
    normalized: bool
    """Whether the shares of a token's experts are made to add up to 1."""
    block: str
    """What the mixture is called in the checkpoint, and `parts` its gate, up and down layers."""
    parts: tuple[str, str, str]


class NotRunnable(ValueError):
    """What the file says and the engine does not do."""


class _File(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _GenerationFile(_File):
    eos_token_id: _Ids = None


class _Rope(_File):
    """Rotary positions, as rope_parameters (transformers 5) or rope_scaling (before it) gives them."""

    model_config = ConfigDict(extra="forbid")

    rope_type: Literal["default", "llama3"] = "default"
    rope_theta: _Positive | None = None
    partial_rotary_factor: Literal[1] | None = None
    factor: _Positive | None = None
    low_freq_factor: _Positive | None = None
    high_freq_factor: _Positive | None = None
    original_max_position_embeddings: _Context | None = None

    def scaling(self) -> RopeScaling | None:
        values = {field.name: getattr(self, field.name) for field in fields(RopeScaling)}
        missing = [name for name, value in values.items() if value is None]
        if self.rope_type == "default":
            if len(missing) < len(values):
                given = ", ".join(name for name in values if name not in missing)
                raise NotRunnable(f"rope type 'default' with {given}, which only 'llama3' has; give rope_type")
            return None
        if missing:
            raise NotRunnable(f"llama3 rope scaling without {', '.join(missing)}")
        if values["low_freq_factor"] >= values["high_freq_factor"]:
            raise NotRunnable("low_freq_factor of the rope scaling must be below its high_freq_factor")
        return RopeScaling(**values)


class ConfigFile(_File):
    """What the families have in common."""

    has_qk_norm: ClassVar[bool] = False

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: Annotated[int, Interval(ge=1, le=2**16)]
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    max_position_embeddings: _Context = 2048
    rms_norm_eps: Annotated[float, Interval(ge=0, le=1)] = 1e-6
    hidden_act: Literal["silu"] = "silu"
    rope_theta: _Positive | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: Literal[1] | None = None
    original_max_position_embeddings: None = None
    """Some files have it beside rope_scaling; there transformers prefers it."""
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    eos_token_id: _Ids = None
    sliding_window: _Window | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, validation_alias=AliasChoices("dtype", "torch_dtype")
    )
    quantization_config: dict[str, Any] | None = None
    is_causal: Literal[True] | None = None
    """False makes a text encoder of the model."""
    text_config: None = None
    """Models of several parts have their sizes there."""

    def qkv_and_o_bias(self) -> tuple[bool, bool]:
        return self.attention_bias, self.attention_bias

    def default_layer_types(self) -> list[str]:
        """Used where the file has no layer_types."""
        return ["full_attention"] * self.num_hidden_layers

    def window(self) -> int | None:
        """The sliding window, which all layers must share."""
        types = self.layer_types or self.default_layer_types()
        if len(types) != self.num_hidden_layers:
            raise NotRunnable(f"layer_types has {len(types)} entries for {self.num_hidden_layers} layers")
        if len(set(types)) > 1:
            raise NotRunnable("layers with and without sliding window; the engine runs one kind")
        if types[0] == "full_attention":
            return None
        if self.sliding_window is None:
            raise NotRunnable("layer_types has sliding_attention, but sliding_window is null or off")
        return self.sliding_window

    def rope(self) -> tuple[float, RopeScaling | None]:
        """(base, scaling), whichever way the file gives them."""
        if self.rope_scaling and self.rope_parameters and self.rope_scaling != self.rope_parameters:
            raise NotRunnable("rope_scaling and rope_parameters differ; keep the one that is meant")
        given = dict(self.rope_parameters or self.rope_scaling or {})
        old_name = given.pop("type", None)
        if given.setdefault("rope_type", old_name or "default") != (old_name or given["rope_type"]):
            raise NotRunnable(f"rope_type {shown(given['rope_type'])} and type {shown(old_name)} differ; keep one")
        rope = _checked(_Rope, given, "rope scaling: ")
        bases = {base for base in (self.rope_theta, rope.rope_theta) if base is not None}
        if len(bases) > 1:
            raise NotRunnable(f"rope_theta is both {self.rope_theta} and {rope.rope_theta}; keep the one that is meant")
        return bases.pop() if bases else 10000.0, rope.scaling()

    def heads(self) -> tuple[int, int, int]:
        """(query heads, key heads, head size)."""
        queries = self.num_attention_heads
        keys, size = self.num_key_value_heads or queries, self.head_dim or self.hidden_size // queries
        if queries % keys or size % 2 or not 0 < size * queries <= 2**24:
            raise NotRunnable(
                f"{queries} query heads over {keys} key heads of size {size}; query heads must be a multiple of key "
                "heads and the head size even"
            )
        return queries, keys, size

    def eos_ids(self) -> list[int]:
        return _as_list(self.eos_token_id)

    def experts(self) -> ExpertsConfig | None:
        """What stands in place of the MLP, in all layers."""
        return None

    def stored_int8(self) -> StoredInt8 | None:
        """The INT8 weights, if they are; refused unless `rowint8 quantize` wrote every linear layer in INT8."""
        if not self.quantization_config:
            return None
        given = dict(self.quantization_config)
        method, serialized = given.pop("quant_method", "an unnamed method"), given.pop("serialized", True)
        activations = given.pop("activations", None)
        block = given.pop("rotation_block", activations and LARGEST_BLOCK)
        if method != "rowint8":
            what = method if isinstance(method, str) else shown(method)
            raise NotRunnable(f"the checkpoint is already quantized ({what}); give the fp32, bf16 or fp16 original")
        options = {key: value for key, value in given.items() if value}
        if options or not isinstance(serialized, bool):
            raise NotRunnable(
                f"quantization_config has {shown(options or {'serialized': serialized})}; the engine runs rowint8 "
                "checkpoints whose linear layers are all INT8, without further options; run this one in vLLM"
            )
        if activations is None and block is None:
            return StoredInt8(None) if serialized else None
        if not serialized or activations != "int8" or type(block) is not int or block not in BLOCKS:
            raise NotRunnable(
                f"quantization_config has activations {shown(activations)} and rotation_block {shown(block)}; accepted "
                f'in a checkpoint of INT8 weights are "int8" and one of {", ".join(map(str, BLOCKS))}, or neither'
            )
        return StoredInt8(block)


class _Llama(ConfigFile):
    model_type: Literal["llama"] | None = None
    eos_token_id: _Ids = 2
    sliding_window: None = None


class _Mistral(ConfigFile):
    model_type: Literal["mistral"] | None = None
    num_key_value_heads: _Size | None = 8
    max_position_embeddings: _Context = 2**17
    eos_token_id: _Ids = 2
    sliding_window: _Window | None = 4096
    layer_types: None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False

    def default_layer_types(self) -> list[str]:
        return ["sliding_attention" if self.sliding_window else "full_attention"] * self.num_hidden_layers


class _Qwen2(ConfigFile):
    model_type: Literal["qwen2"] | None = None
    num_key_value_heads: _Size | None = 32
    max_position_embeddings: _Context = 2**15
    use_sliding_window: bool = False
    sliding_window: _Window | None = 4096
    max_window_layers: Annotated[int, Ge(0)] = 28
    mlp_bias: Literal[False] = False

    @model_validator(mode="after")
    def _switch_window(self) -> "_Qwen2":
        if not self.use_sliding_window:
            self.sliding_window = None
        return self

    def default_layer_types(self) -> list[str]:
        full = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
        kinds = ("full_attention" if layer < full else "sliding_attention" for layer in range(self.num_hidden_layers))
        return list(kinds)

    def qkv_and_o_bias(self) -> tuple[bool, bool]:
        return True, False


class _Qwen3(_Qwen2):
    has_qk_norm: ClassVar[bool] = True

    model_type: Literal["qwen3"] | None = None
    head_dim: _Size | None = 128

    def qkv_and_o_bias(self) -> tuple[bool, bool]:
        return self.attention_bias, self.attention_bias


class _Qwen3Moe(_Qwen3):
    model_type: Literal["qwen3_moe"] | None = None
    num_key_value_heads: _Size | None = 4
    head_dim: _Size | None = None
    num_experts: _Size = Field(default=128, validation_alias=AliasChoices("num_experts", "num_local_experts"))
    num_experts_per_tok: _Size = 8
    moe_intermediate_size: _Size = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: Literal[1] = 1
    mlp_only_layers: Annotated[list[int], MaxLen(0)] | None = None

    def experts(self) -> ExpertsConfig:
        sizes = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        return _some(ExpertsConfig(*sizes, self.norm_topk_prob, "mlp", ("gate_proj", "up_proj", "down_proj")))


class _Mixtral(ConfigFile):
    model_type: Literal["mixtral"] | None = None
    num_key_value_heads: _Size | None = 8
    max_position_embeddings: _Context = 2**17
    rms_norm_eps: Annotated[float, Interval(ge=0, le=1)] = 1e-5
    eos_token_id: _Ids = 2
    sliding_window: None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    num_local_experts: _Size = 8
    num_experts_per_tok: _Size = 2

    def experts(self) -> ExpertsConfig:
        sizes = self.num_local_experts, self.num_experts_per_tok, self.intermediate_size
        return _some(ExpertsConfig(*sizes, True, "block_sparse_moe", ("w1", "w3", "w2")))


def _some(experts: ExpertsConfig) -> ExpertsConfig:
    if experts.topk > experts.count:
        raise NotRunnable(f"num_experts_per_tok is {experts.topk}, but there are {experts.count} experts")
    return experts


FAMILIES: dict[str, type[ConfigFile]] = {
    "LlamaForCausalLM": _Llama,
    "MistralForCausalLM": _Mistral,
    "Qwen2ForCausalLM": _Qwen2,
    "Qwen3ForCausalLM": _Qwen3,
    "Qwen3MoeForCausalLM": _Qwen3Moe,
    "MixtralForCausalLM": _Mixtral,
}
"""Architectures that the engine runs."""


def _architecture(raw: dict[str, Any]) -> str:
    given = raw.get("architectures")
    names = given if isinstance(given, list) and given else [given or "none named"]
    if len(names) != 1 or not isinstance(names[0], str) or names[0] not in FAMILIES:
        what = ", ".join(name if isinstance(name, str) else shown(name) for name in names)
        raise NotRunnable(f"architecture {one_line(what)}; the engine runs {', '.join(FAMILIES)}")
    return names[0]


def _as_list(ids: _Ids) -> list[int]:
    return [ids] if isinstance(ids, int) else ids or []


def _checked(kind: type[_Parsed], raw: dict[str, Any], where: str = "") -> _Parsed:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise NotRunnable(where + describe(error)) from None
    except OverflowError:
        raise NotRunnable(f"{where}a number is too large for a double") from None


def read_config(folder: Path) -> ConfigFile:
    """Raises EngineError where config.json is missing or broken, NotRunnable where a field in it is refused."""
    raw = read_json(folder / "config.json")
    return _checked(FAMILIES[_architecture(raw)], raw)


def read_more_eos_ids(folder: Path) -> list[int]:
    """End-of-sequence ids of generation_config.json, where there is one; raises as `read_config`."""
    path = folder / "generation_config.json"
    if not path.exists():
        return []
    return _as_list(_checked(_GenerationFile, read_json(path), f"{path.name}: ").eos_token_id)
