"""What is far out in a column follows from all rows, in whatever pieces they were read."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError, SourceError
from pipelines.data import outliers
from tests import fakes, observed_data

STEP = "data.cleaning=[{columns: {outliers: {价格: 3}}}]"


def far_out(numbers: list[float], reach: float = 1.5) -> tuple[float, float]:
    return outliers.fences("n", outliers.buckets(numbers), reach)


@given(st.lists(st.floats(-1e300, 1e300, allow_subnormal=False), min_size=8, max_size=60))
def test_counts_of_pieces_add_up_and_stay_in_order(numbers: list[float]) -> None:
    whole = outliers.buckets(numbers)
    assert outliers.buckets(numbers[:3]) + outliers.buckets(numbers[3:]) == whole
    found = [next(iter(outliers.buckets([number]))) for number in sorted(numbers)]
    assert found == sorted(found)
    for number, bucket in zip(sorted(numbers), found, strict=True):
        assert outliers.edge(bucket) <= number <= outliers.edge(bucket + 1)


@pytest.mark.parametrize("shift", [0.0, -500.0])
def test_fences_lie_where_tukey_put_them(shift: float) -> None:
    chance = random.Random(0)
    numbers = [shift + chance.gauss(100, 10) for _ in range(4000)]
    low, high = np.quantile(numbers, [0.25, 0.75])
    expected = (low - 1.5 * (high - low), high + 1.5 * (high - low))
    # Of quartiles that are told to within one part in 128.
    assert np.allclose(far_out(numbers), expected, atol=5 * max(abs(low), abs(high)) / 128)


def test_a_column_of_one_number_has_no_outlier_in_it() -> None:
    low, high = far_out([7.3] * 50)
    assert low <= 7.3 <= high < 7.6


def test_too_few_numbers_are_said() -> None:
    with pytest.raises(SourceError, match="hold 7 numbers there, fewer than 8"):
        outliers.fences("价格", Counter({1: 7}), 3)


def test_rows_that_are_far_out_are_dropped(tmp_path: Path) -> None:
    rows = [{"text": f"第{n}件商品的说明 " * 9, "价格": 90 + n % 20} for n in range(60)]
    rows[13]["价格"], rows[31]["价格"], rows[40]["价格"] = "1e6", -4000, "无"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    config = fakes.config(
        "gpt-demo",
        f"data.sources=[{tmp_path}/a.jsonl]",
        STEP,
        *("data.vocab_size=300", "data.heldout_fraction=0.3", "data.partition_bytes=1000"),
        root=tmp_path / "root",
    )
    made = observed_data.prepared(config)[0]
    detail = made.manifest.detail
    assert detail["counts"]["dropped"] == {"columns.bounds": 2}
    low, high = detail["fences"]["价格"]
    assert 20 < low < 90 and 110 < high < 180


def test_a_stream_has_no_rows_to_look_at_first() -> None:
    with pytest.raises(ConfigError, match="give columns.bounds"):
        fakes.config("gpt-demo", "train.input=stream", STEP)
