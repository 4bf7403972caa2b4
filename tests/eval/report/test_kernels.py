"""rowint8.eval.report.kernels and .chain: what is shown of kernel rows and chain rows."""

from dataclasses import replace

import pytest
from rich.console import Console

from rowint8.eval.errors import EvalError
from rowint8.eval.report.chain import chain_part, chain_table
from rowint8.eval.report.checks import check_all
from rowint8.eval.report.kernels import kernel_section, kernel_tables, misses_line, worst_table
from rowint8.eval.results.environment import describe_environment
from rowint8.eval.results.files import Results, read_results, write_results
from rowint8.eval.results.schema import Ratio
from tests.eval.results.test_roofline import CEILINGS, CHAIN, LINEAR, NORM


def printed(rows):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in kernel_tables(rows, CEILINGS):
        console.print(table)
    return console.export_text()


def test_table_shows_ratio_rates_and_share_of_the_limit():
    lines = printed([LINEAR, NORM]).splitlines()
    (linear,) = (line.split() for line in lines if line.strip().startswith("gate_up"))
    assert linear == ["gate_up", "1", "80.0", "160.0", "100.0", "0.80", "machete", "1469", "2.9", "73%"]
    (norm,) = (line.split() for line in lines if line.strip().startswith("h4096"))
    assert norm == ["h4096", "1024", "20.0", "16.0", "1.25", "vllm", "1678", "84%"]
    text = " ".join(" ".join(lines).split())
    assert "largest spread 3.5%" in text
    assert "linear: microseconds a call, bfloat16 activations" in text


def paired(m, ours, low):
    interval = Ratio(value=ours / 100, low=low, high=ours / 100)
    return replace(LINEAR, M=m, us=dict(rowint8=ours, cublas_bf16=100.0), paired=dict(cublas_bf16=interval))


def test_the_worst_cells_come_first_and_the_certain_ones_are_counted():
    rows = [paired(m, 90.0 + m, (90.0 + m) / 100 - 0.01) for m in range(1, 21)]
    table = worst_table(rows)
    assert [line[1] for line in table.lines] == [str(m) for m in range(20, 10, -1)]
    assert table.lines[0] == ["linear gate_up", "20", "110.0", "100.0 cublas_bf16", "1.100", "1.090 to 1.100", ""]
    assert misses_line(rows) == (
        "Slower, with the lower end of the ratio's 95% interval above 1.02, than cuBLAS in 7 of 20 cells, "
        "the best other 8-bit kernel in 0 of 0 cells, the best other in 7 of 20 cells."
    )
    assert worst_table([replace(LINEAR, sm_mhz=(1980, 1755))]).lines[0][-2:] == ["", "1980 to 1755"]


def test_rows_of_older_files_have_no_intervals_and_are_told_all_the_same():
    text = kernel_section(Results(environment=describe_environment(), command="c", rows=(LINEAR, NORM)))
    assert "Slower, with the ratio above 1.02, than cuBLAS in 0 of 1 cells" in text
    assert "| add_rms_norm h4096 | 1024 | 20.0 | 16.0 vllm | 1.250 |  |  |" in text
    assert "| tokens | 1 |" in text
    assert "| linear gate_up | 0.80 |" in text


def test_a_chain_stands_beside_bf16_and_its_products_alone(tmp_path):
    bf16 = replace(CHAIN, chain="bf16", kernels="cuBLAS", us=5128.0, ratio=None)
    results = Results(environment=describe_environment(), command="c", rows=(bf16, CHAIN))
    write_results(tmp_path / "c.json", results)
    assert read_results(tmp_path / "c.json") == results
    assert chain_table(results.rows).lines == [
        ["128", "bf16", "5128", "1.0%", "", "", "4872", "3520", "1.38"],
        ["128", "rowint8", "4000", "1.0%", "0.780", "0.770 to 0.790", "3744", "3520", "1.06"],
    ]
    assert "bf16: cuBLAS. rowint8: ours." in chain_part(results)
    assert "| 128 | 5128 | 0.78 (0.77 to 0.79) |" in chain_part(results)
    check_all({"c": results})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (replace(CHAIN, ratio=Ratio(value=0.1, low=0.1, high=0.1)), "rowint8 takes 0.10 times bf16's time"),
        (replace(CHAIN, us=400.0), "the products take 144 us in the chain, but 3520 us alone"),
    ],
)
def test_a_chain_that_cannot_be_stops_the_report(row, message):
    with pytest.raises(EvalError, match=message):
        check_all({"c": Results(environment=describe_environment(), command="c", rows=(row,))})


def test_an_interval_holds_its_value():
    with pytest.raises(ValueError, match="must rise"):
        Ratio(value=1.0, low=1.1, high=1.2)
