"""`series.as_of`: a table read as it was on a day."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.series_config import SeriesConfig
from modelmill.components.forecasting.series_table import FILE
from tests.components.forecasting.tables import Prepare, long

SOURCE = {"type": "packaged", "names": ["nile"]}


def test_a_run_of_the_past_reads_what_a_shorter_table_holds(prepare: Prepare) -> None:
    whole = long(
        ("a", "2024-01-01", "D", [1.0, 3.0, 2.0, 5.0, 4.0, 7.0]),
        ("b", "2024-01-03", "D", [9.0, 8.0, 9.0, np.inf]),  # infinite after the day, so nobody's trouble
        ("later", "2024-01-05", "D", [1.0, 2.0]),
    )
    then = prepare.manifest(whole, as_of="2024-01-04", horizon=1, windows=1)
    cut = prepare.manifest(whole[whole.timestamp <= pd.Timestamp("2024-01-04")], horizon=1, windows=1)
    digest = {entry.path: entry.sha256 for entry in then.files}[FILE]
    assert digest == {entry.path: entry.sha256 for entry in cut.files}[FILE]
    assert then.counts["points"] == 6


def test_a_date_is_its_end_and_a_time_is_itself(prepare: Prepare) -> None:
    hours = long(("a", "2024-01-01", "h", list(range(48))))
    assert prepare(hours, as_of="2024-01-01").lengths.tolist() == [24]
    assert prepare(hours, as_of="2024-01-01T05:00:00").lengths.tolist() == [6]
    assert prepare(hours, as_of="").lengths.tolist() == [48]


def test_what_is_known_ahead_stays(prepare: Prepare) -> None:
    frame = long(("a", "2024-01-01", "D", [1.0, 3.0, 2.0, 5.0, 4.0]))
    frame["price"], frame["visitors"] = [10.0, 11, 12, 13, np.nan], [1.0, 2, 3, 4, 5]
    table = prepare(frame, as_of="2024-01-03", known_covariates=["price"], past_covariates=["visitors"])
    assert table.lengths.tolist() == [3]
    assert table.covariate(0, "price").tolist() == [10, 11, 12, 13]
    assert table.covariate(0, "visitors").tolist() == [1, 2, 3]


def test_a_fault_names_the_row_of_the_file(prepare: Prepare) -> None:
    text = "item_id,timestamp,target\nz,2025-01-01,1\na,2024-01-01,1\na,2024-01-02,2\na,2024-01-02,3\n"
    with pytest.raises(UserError, match=r"row 3 .*'a' at 2024-01-02.*row 4"):
        prepare(text, as_of="2024-06-01")


def test_a_day_before_all_rows_is_refused(prepare: Prepare) -> None:
    with pytest.raises(UserError, match=r"series.as_of: 2023-01-01 .* first row is of 2024-01-01"):
        prepare(long(("a", "2024-01-01", "D", [1.0, 2.0, 3.0])), as_of="2023-01-01")


@pytest.mark.parametrize(("value", "word"), [("yesterday", "write 2024-01-31"), ("2024-01-01T00:00+02:00", "offset")])
def test_other_texts_are_refused(value: str, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        SeriesConfig.model_validate({"source": SOURCE, "horizon": 1, "as_of": value})
