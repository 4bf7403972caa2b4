"""rowint8.eval.report.kernels: what the console shows of kernel rows."""

from rich.console import Console

from rowint8.eval.report.kernels import kernel_tables
from tests.eval.results.test_roofline import CEILINGS, LINEAR, NORM


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
