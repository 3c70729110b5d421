"""The line in which a run is held against its plan."""

from cluster.telemetry import Row
from pipelines.training.forecast import Forecast, compared

GIB = float(1 << 30)
MEASURED: Row = {"step": 3.0, "peak_memory_bytes": 2 * GIB, "predictions_per_second": 1000.0}


def test_the_line_says_both_and_by_how_much_they_differ() -> None:
    row = MEASURED | Forecast(round(2.2 * GIB), 900.0).row()
    assert compared(row) == (
        "pretrain: a worker holds 2.00 GiB at its peak, planned 2.20 GiB (+10%); "
        "1,000/s, planned 900/s (-10%)"
    )
    unknown = MEASURED | Forecast(round(2 * GIB), float("nan")).row()
    assert (
        compared(unknown) == "pretrain: a worker holds 2.00 GiB at its peak, planned 2.00 GiB (+0%)"
    )
    assert compared(MEASURED) is None
