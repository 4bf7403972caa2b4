"""`rowint8 profile`: names of kernels put into parts, arithmetic on made-up events, the command on a tiny model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType
from typer.testing import CliRunner

from rowint8.baseline_engine.model_config import ModelConfig
from rowint8.eval.cli.app import app
from rowint8.eval.engines import profile as job
from rowint8.eval.engines.parts import Interval, Work, device_work, kernel_part, longest, operator_work, part_ms
from rowint8.eval.engines.profile_worker import _kernels
from rowint8.eval.engines.setups import write_shape
from rowint8.eval.errors import EvalError
from rowint8.eval.report.checks import check_all
from rowint8.eval.report.profile import console_tables, profile_section
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Results, read_results
from rowint8.eval.results.schema import PARTS, ProfileRow
from rowint8.kernels import add_rms_norm, few_tokens, int8_tokens, one_token, triton_matmul
from rowint8.kernels.hopper import kernel as hopper

KERNELS = {
    one_token.one_token_kernel.__name__: "matmul",
    triton_matmul.many_tokens_kernel.__name__: "matmul",
    hopper.hopper_kernel.__name__: "matmul",
    few_tokens.few_tokens_kernel.__name__: "matmul",
    int8_tokens._int8_tokens_kernel.__name__: "norm",
    add_rms_norm._add_rms_norm.__name__: "norm",
    "nvjet_tst_64x8_64x16_4x1_v_bz_splitK_TNT": "matmul",
    "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, ...>": "matmul",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, ...>": "matmul",
    "ampere_bf16_s16816gemm_bf16_64x64_sliced1x2_ldg8_f2f_stages_64x5_tn": "matmul",
    "void marlin::Marlin<__nv_bfloat16, ...>": "matmul",
    "triton_red_fused__to_copy_mm_mul_t_0": "matmul",
    "triton_tem_fused__to_copy_mm_mul_t_1": "matmul",
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>": "attention",
    "void cutlass::device_kernel<flash::FlashAttnFwdCombine<...>>": "attention",
    "flash::prepare_varlen_num_blocks_kernel(int, ...)": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::...)": "attention",
    "kernel_unified_attention_2d": "attention",
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0": "norm",
    "triton_per_fused__fused_rms_norm_add_1": "norm",
    "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>": "norm",
    "triton_poi_fused__to_copy_mul_silu_split_1": "elementwise",
    "triton_poi_fused_addcmul_index_copy_mul_roll_2": "elementwise",
    "void vllm::act_and_mul_kernel<c10::BFloat16, ...>": "elementwise",
    "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, ...>": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ...>": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<c10::BFloat16, at::native::ArgMaxOps<float>, ...>>": (
        "sampling"
    ),
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MaxOps<float>, ...>>": "sampling",
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, ...>": "sampling",
    "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>": "sampling",
    "void at::native::tensor_kernel_scan_innermost_dim<float, std::plus<float>>": "sampling",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)::...>": "copies",
    "void at::native::vectorized_gather_kernel<16, long>(...)": "copies",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "Memset (Device)": "copies",
    "mystery_kernel": "other",
}


@pytest.mark.parametrize(("name", "part"), KERNELS.items())
def test_a_kernels_part_is_told_by_its_name(name, part):
    assert kernel_part(name) == part


def test_a_moment_counts_once_for_the_kernel_that_began_first():
    work = device_work(
        [
            Interval("mystery", 130.0, 140.0),
            Interval("nvjet_a", 100.0, 110.0),
            Interval("flash_b", 108.0, 120.0),  # a dependent launch: 2 us of it are under nvjet_a
            Interval("Memset (Device)", 109.0, 115.0),  # entirely under the others
        ]
    )
    assert work == [
        Work("matmul", "nvjet_a", 10.0),
        Work("attention", "flash_b", 10.0),
        Work("copies", "Memset (Device)", 0.0),
        Work("other", "mystery", 10.0),
    ]


def test_what_the_parts_leave_of_a_step_is_gaps():
    work = [Work("matmul", "a", 6000.0), Work("attention", "b", 1000.0), Work("matmul", "c", 1000.0)]
    parts = part_ms(work, steps=2, window_ms=5.0)
    assert tuple(parts) == PARTS
    assert (parts["matmul"], parts["attention"], parts["gaps"]) == (3.5, 0.5, 1.0)
    assert sum(parts.values()) == 5.0
    assert part_ms(work, steps=2, window_ms=3.0)["gaps"] == 0.0


def test_the_longest_kernels_come_first_under_one_name():
    work = [Work("other", "a", 1000.0), Work("matmul", "b\n  c", 3000.0), Work("other", "a", 4000.0)]
    assert longest(work, steps=2) == {"other: a": 2.5, "matmul: b c": 1.5}
    assert longest(work, steps=2, most=1) == {"other: a": 2.5}


def test_an_operator_belongs_to_the_outermost_that_says_something():
    def event(name, own, parent=None):
        return SimpleNamespace(name=name, self_cpu_time_total=own, cpu_parent=parent)

    region = event("Torch-Compiled Region: 0/0", 1.0)
    graph = event("## Call CompiledFxGraph fe3i ##", 2.0, region)
    linear = event("rowint8::linear", 3.0, graph)
    attention = event("aten::scaled_dot_product_attention", 4.0)
    events = [region, graph, linear, event("aten::mul", 5.0, linear), attention]
    events += [event("aten::_softmax", 6.0, attention), event("aten::argmax", 7.0), event("aten::view", 8.0)]
    parts = [(work.part, work.us) for work in operator_work(events)]
    assert parts == [
        ("other", 1.0),
        ("elementwise", 2.0),
        ("matmul", 3.0),
        ("matmul", 5.0),
        ("attention", 4.0),
        ("attention", 6.0),
        ("sampling", 7.0),
        ("other", 8.0),
    ]


def test_only_what_runs_on_the_device_is_a_kernel():
    def event(name, device, annotated=False):
        span = SimpleNamespace(start=1.0, end=2.5)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotated, time_range=span)

    events = [
        event("nvjet_a", DeviceType.CUDA),
        event("cudaGraphLaunch", DeviceType.CPU),
        event("Torch-Compiled Region: 0/0", DeviceType.CUDA, annotated=True),
    ]
    assert _kernels(events) == [Interval("nvjet_a", 1.0, 2.5)]


@pytest.fixture
def row(tmp_path) -> ProfileRow:
    """Of a card that reads 2 TB/s: weights of 1 ms, keys and values of 0.5 ms."""
    write_shape("tiny", tmp_path)
    model = replace(ModelConfig.from_folder(tmp_path), vocab_size=1_000_000, hidden_size=1000)
    parts = {**dict.fromkeys(PARTS, 0.0), "matmul": 2.0, "attention": 1.0, "gaps": 1.0}
    run = {
        "step_ms": 4.0,
        "context": 1000,
        "host_ms": {"schedule": 0.25, "launch": 0.5, "wait": 3.0, "record": 0.125, "detokenize": 0.0625},
        "kv_waste": 0.125,
        "padding": 0.25,
        "served_ms": 4.5,
        "profiled_ms": 5.0,
        "parts_ms": parts,
        "longest_ms": {"matmul: nvjet_a": 2.0},
        "launches": 321.0,
    }
    result = {"weights": 4_000_000_000, "read_tb_s": 2.0, "attention": "flash3"}
    kv_bytes = 2 * 2 * 2 * 64 * 2  # keys and values, layers, heads, head size, bytes
    row = job.profile_row("int8-fused", "baseline", model, 3, "greedy", 32, run, result)
    assert row.weight_bytes == 4_000_000_000 - 2 * 1_000_000 * 1000
    assert row.kv_bytes == 3 * 1000 * kv_bytes
    assert row.limit_ms == pytest.approx({"weights": 1.0, "kv": 3000 * kv_bytes / 2e9})
    return replace(row, limit_ms={"weights": 1.0, "kv": 0.5})


def test_tables_say_shares_and_a_number_for_each_suspect(row):
    rows = row, replace(row, engine="vllm", setup="bf16", host_ms=None, limit_ms=None)
    text = profile_section(Results(environment=describe_environment(), command="c", rows=rows))
    lines = [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines()]
    parts, suspects = (line for line in lines if line[:3] == ["int8-fused", "3", "1000"] and len(line) > 5)
    assert parts[3:6] == ["4.000", "2.000 (50%)", "1.000 (25%)"]
    assert parts[-2:] == ["1.000 (25%)", "321"]
    assert suspects[3:6] == ["2.00", "2.00", "2.67"]
    assert suspects[6:] == ["0.250", "0.875", "3.000", "0.062", "4.500", "25.0%", "12.5%"]
    theirs = [line for line in lines if line[0] == "vLLM bf16"]
    assert theirs[1][3:10] == ["-"] * 7
    assert [len(table.columns) for table in console_tables([row] * 5)] == [5, 5, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_ms": 9.0, "profiled_ms": 9.0}, "the parts add up to 4.000 ms of a step of 9.000"),
        ({"limit_ms": {"weights": 2.6, "kv": 0.5}}, "matmul takes 2.000 ms, but reading the weights 2.600"),
    ],
)
def test_what_cannot_be_stops_the_report(row, change, message):
    results = Results(environment=describe_environment(), command="c", rows=(row,))
    check_all({"profile": results})
    with pytest.raises(EvalError, match=message):
        check_all({"profile": replace(results, rows=(replace(row, **change),))})


def test_a_part_without_a_number_is_refused(row):
    for change in (
        {"parts_ms": {"matmul": 1.0}},
        {"parts_ms": dict.fromkeys(row.parts_ms, 0.0)},
        {"host_ms": {"schedule": 1.0, "launch": 1.0, "wait": 1.0}},
        {"host_ms": {}},
        {"limit_ms": {"weights": 1.0}},
        {"limit_ms": {"weights": 0.0, "kv": 0.0}},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(change))} must have "):
            replace(row, **change)


def test_the_command_on_a_tiny_model(tmp_path):
    file = tmp_path / "profile.json"
    options = ["--config", "tiny", "--setups", "bf16-eager", "--batches", "1,3", "--sampling", "greedy,top-p"]
    options += ["--prompt-tokens", "20", "--steps", "4", "--json", str(file)]
    result = CliRunner().invoke(app, ["profile", *options])
    assert result.exit_code == 0, result.output
    rows = read_results(file).rows
    assert [(row.batch, row.sampling) for row in rows] == [
        (batch, sampling) for batch in (1, 3) for sampling in ("greedy", "top-p")
    ]
    for row in rows:
        assert row.context == 20 + 8 + 4 // 2
        assert row.kv_bytes == row.batch * row.context * 2 * 2 * 2 * 64 * 2
        assert sum(row.parts_ms.values()) == pytest.approx(row.profiled_ms)
        assert all(row.parts_ms[part] > 0 for part in ("matmul", "attention", "norm", "elementwise", "sampling"))
        assert set(row.host_ms) == {"schedule", "launch", "wait", "record", "detokenize"}
        assert sum(row.host_ms.values()) - row.host_ms["detokenize"] <= row.step_ms
        assert (row.limit_ms, row.padding) == (None, 0.0)
    greedy, drawn = rows[:2]
    assert drawn.launches > greedy.launches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batches", "1,0"], "--batches is 1,0; accepted are whole numbers above 0"),
        (["--sampling", "beam"], "--sampling has beam; accepted are greedy, top-p"),
        (["--setups", "int3"], "--setups has int3; accepted are bf16-eager"),
    ],
)
def test_wrong_options_say_what_is_accepted(options, message):
    result = CliRunner().invoke(app, ["profile", *options])
    assert isinstance(result.exception, EvalError)
    assert message in str(result.exception)
