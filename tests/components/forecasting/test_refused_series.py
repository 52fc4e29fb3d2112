"""Step `prepare_series`: what it refuses by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.series import prepare_series
from modelmill.components.forecasting.series_config import SeriesConfig
from modelmill.components.forecasting.series_table import open_series
from tests.components.forecasting.conftest import Produce
from tests.components.forecasting.tables import Frame, Prepare, config, long

REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "constant": (
        long(("a", "2024-01-01", "D", [3, 3, 3])),
        {"constant": "refuse"},
        r"^series\.constant: items that never change: 'a' \(3\); remove them, or set series\.constant to drop",
    ),
    "all missing": (
        long(("a", "2024-01-01", "D", [np.nan] * 3), ("b", "2024-01-01", "D", [1, 2, 3])),
        {},
        r"^series\.all_missing: items without a single value: 'a'; remove them",
    ),
    "too short for the horizon": (
        long(("a", "2024-01-01", "D", [1, 2, 3])),
        {"horizon": 2, "windows": 2},
        r"^series\.too_short: .*\(horizon 2, windows 2\): 'a' \(0 of 3 points\)",
    ),
    "two rows for one timestamp": (
        "item_id,timestamp,target\na,2024-01-01,1\na,2024-01-02,2\na,2024-01-01,3\n",
        {},
        r"^series\.duplicates: .*a\.csv row 1 \('a' at 2024-01-01\), .*a\.csv row 3 \('a' at 2024-01-01\); remove",
    ),
    "irregular": (
        "item_id,timestamp,target\na,2024-01-01,1\na,2024-01-02,2\na,2024-01-03,2\na,2024-01-04 06:00,3\n",
        {},
        r"^series\.irregular: .*grid of D from 2024-01-01: .*a\.csv row 4 \('a' at 2024-01-04 06:00:00\)",
    ),
    "another frequency": (
        long(("a", "2024-01-01", "D", [1, 2, 3])),
        {"frequency": "W-MON"},
        r"^series\.irregular: .*grid of W-MON.* and 2|row 2 .*row 3",
    ),
    "gap": (
        long(("a", "2024-01-01", "h", [1, 2, 3, 4, 5])).drop([2]),
        {"gaps": "refuse"},
        r"^series\.gaps: rows are missing before: .*a\.csv row 3 \('a' at 2024-01-01 03:00:00\)",
    ),
    "nearly all gaps": (
        "item_id,timestamp,target\na,2024-01-01 00:00,1\na,2024-01-01 00:01,1\na,2024-01-01 00:02,1\na,2025-01-01,1\n",
        {},
        r"^series\.gaps: series that are nearly all gaps: 'a' \(4 rows over 527041 steps of min\)",
    ),
    "infinite": (
        long(("a", "2024-01-01", "D", [1, np.inf, 3])),
        {},
        r"^series\.infinite: the target is infinite: .*a\.csv row 2 \('a' at 2024-01-02\); mend or remove the rows",
    ),
    "not a number": (
        'item_id,timestamp,target\na,2024-01-01,1\na,2024-01-02,"1,5"\na,2024-01-03,n/a\n',
        {},
        r"column 'target' is not a number: .*a\.csv row 2 \('1,5'\); write numbers with a point",
    ),
    "no timestamp": (
        "item_id,timestamp,target\na,2024-01-01,1\na,yesterday,2\na,,2\na,3024-01-01,1\n",
        {},
        r"column 'timestamp' is not a timestamp .*row 2 \('yesterday'\), .*row 3 \(''\), .*row 4 \('3024-01-01'\)",
    ),
    "offsets here and there": (
        "item_id,timestamp,target\na,2024-01-01T00:00,1\na,2024-01-01T00:00Z,2\n",
        {},
        r"a\.csv row 2, column 'timestamp': some timestamps have an offset and others not",
    ),
    "no item": (
        "item_id,timestamp,target\na,2024-01-01,1\n ,2024-01-02,2\n",
        {},
        r"the item in column 'item_id' is empty: .*a\.csv row 2; fill it",
    ),
    "unknown covariate": (
        long(("a", "2024-01-01", "D", [1, 2, 3])),
        {"known_covariates": ["price"]},
        r"has the column 'price' not at all; its columns are item_id, timestamp, target",
    ),
    "column twice": (
        "item_id,timestamp,target,target\na,2024-01-01,1,2\n",
        {},
        r"has the column 'target' twice",
    ),
    "covariate of numbers and text": (
        "item_id,timestamp,target,price\na,2024-01-01,1,2\na,2024-01-02,1,high\n",
        {"past_covariates": ["price"]},
        r"column 'price' holds numbers and, in some rows, text: .*row 2 \('high'\)",
    ),
    "infinite covariate": (
        "item_id,timestamp,target,price\na,2024-01-01,1,2\na,2024-01-02,1,inf\n",
        {"past_covariates": ["price"]},
        r"covariate 'price' is infinite: .*row 2",
    ),
    "torn line": (
        "item_id,timestamp,target\na,2024-01-01\n",
        {},
        r"a\.csv cannot be read \(.*Expected 3 columns, got 2",
    ),
    "no row": ("item_id,timestamp,target\n", {}, r"a\.csv has no row"),
    "nothing": ("", {}, r"has the column 'item_id' not at all"),
    "one row": (
        "item_id,timestamp,target\na,2024-01-01,1\n",
        {"windows": 0},
        r"items with one row, whose frequency cannot be told: 'a'; set series\.frequency",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(prepare: Prepare, name: str) -> None:
    frame, values, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        prepare(frame, **values)


def test_a_message_names_five_places_and_counts_the_others(prepare: Prepare) -> None:
    rows = "".join(f"a,2024-01-01,{n}\n" for n in range(40))
    with pytest.raises(UserError, match=r"row 5 \('a' at 2024-01-01\) and 35 more;"):
        prepare(f"item_id,timestamp,target\n{rows}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"item_id": [1.5], "timestamp": ["2024-01-01"], "target": [1]}, "is double; items are text or integers"),
        ({"item_id": ["a"], "timestamp": [20240101], "target": [1]}, "is int64, not timestamps; give dates"),
        ({"item_id": ["a"], "timestamp": [1.0], "target": [1]}, "is double; give timestamps"),
        ({"item_id": ["a"], "timestamp": ["2024-01-01"], "target": [[1]]}, "is list<.*; give a column of numbers"),
        ({"item_id": ["a", None], "timestamp": ["2024-01-01"] * 2, "target": [1, 2]}, "is empty: .* row 2;"),
    ],
    ids=["item", "integer time", "float time", "list", "null item"],
)
def test_columns_of_another_type(produce: Produce, tmp_path: Path, content: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(content), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        produce(prepare_series, config(tmp_path / "a.parquet"))


def test_files_that_are_no_tables(produce: Produce, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        produce(prepare_series, config(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_bytes(b"item_id,timestamp,target\n\xff,2024-01-01,1\n")
    with pytest.raises(UserError, match=r"a\.csv cannot be read \(.*UTF8"):
        produce(prepare_series, config(tmp_path / "a.csv"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt has a format that is not read; convert it to csv and parquet"):
        config(tmp_path / "a.txt").fingerprint()


def test_a_covariate_must_be_of_one_kind_in_all_files(produce: Produce, tmp_path: Path) -> None:
    for number, values in enumerate((["x", "y"], [1, 2], ["", ""])):
        days = pd.date_range(f"2024-0{number + 1}-01", periods=2)
        frame = Frame({"item_id": f"i{number}", "timestamp": days, "target": [1, 2], "sky": values})
        frame.to_csv(tmp_path / f"{number}.csv", index=False)
    paths = [tmp_path / "0.csv", tmp_path / "2.csv"]
    table = open_series(produce(prepare_series, config(paths, past_covariates=["sky"])))
    assert table.covariate(1, "sky").tolist() == [None, None]
    with pytest.raises(UserError, match=r"column 'sky' holds numbers in .*1\.csv and text in another file"):
        produce(prepare_series, config([*paths, tmp_path / "1.csv"], past_covariates=["sky"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frequency": "often"}, "'often' is not a frequency that is read; write one like 15min"),
        ({"season_lengths": {"often": 3}}, "'often' is not a frequency"),
        ({"timezone": "Mars/Olympus"}, "'Mars/Olympus' is not a zone"),
        ({"irregular": "round"}, "round needs a frequency to round to; set frequency"),
        ({"target": "timestamp"}, "'timestamp' is named twice"),
        ({"horizon": 0}, "greater than or equal to 1"),
    ],
)
def test_sections_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(Path("a.csv"), **values)


def test_sources_have_the_same_covariates() -> None:
    files = {"type": "files", "paths": ["a"], "past_covariates": ["x"]}
    for other in ({"type": "packaged", "names": ["nile"]}, {"type": "files", "paths": ["b"]}):
        with pytest.raises(ValidationError, match="the sources differ in their covariates"):
            SeriesConfig.model_validate({"source": [files, other], "horizon": 1})
