"""Step `prepare_series`: what it reads and mends."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from moto.server import ThreadedMotoServer

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting.series import prepare_series
from modelmill.components.forecasting.series_config import PackagedName, SeriesConfig
from modelmill.components.forecasting.series_table import open_series
from tests.components.forecasting.conftest import Produce
from tests.components.forecasting.tables import Frame, Prepare, config, long


def test_the_packaged_series(produce: Produce) -> None:
    source = {"type": "packaged", "names": list(get_args(PackagedName))}
    settings = {"source": source, "horizon": 8, "windows": 2, "season_lengths": {"YS": 11, "W-SAT": 52}}
    manifest = produce(prepare_series, SeriesConfig.model_validate(settings))
    table = open_series(manifest)
    assert manifest.counts == {"series": 25, "points": 6751, "missing_points": 59, "constant_series": 0}
    found = {name: number for number, name in enumerate(table.item_ids)}
    assert len(table.target(found["elnino"])) == 732
    assert table.target(found["air_passengers"])[:3].tolist() == [112.0, 118.0, 132.0]
    assert table.frequencies[found["co2"]] == "W-SAT"
    assert table.season_lengths[found["sunspots"]] == 11
    assert table.season_lengths[found["macrodata.cpi"]] == 4
    assert str(table.timestamps(found["macrodata.cpi"])[-1].date()) == "2009-07-01"
    assert table.train(found["nile"]).shape == (84,)
    assert manifest.metadata["frequencies"] == {"QS-JAN": 19, "MS": 2, "YS-JAN": 2, "ME": 1, "W-SAT": 1}
    report = manifest.path("report.html").read_text()
    assert report.count("<svg") == 24
    assert "sunspots" in manifest.path("report.md").read_text()
    rows = pq.read_table(manifest.path("series.parquet")).to_pandas().set_index("item_id")
    nile = table.train(found["nile"])
    assert rows.loc["nile", "seasonal_error"] == pytest.approx(np.abs(nile[11:] - nile[:-11]).mean())
    assert rows.loc["co2", "missing"] == 59
    assert rows.loc["co2", "scale"] == pytest.approx(np.nanmean(table.target(found["co2"])))
    assert rows.loc["co2", "end"] == pd.Timestamp("2001-12-29")
    assert manifest.metadata["dataset_digest"] == table.digest()


def test_equal_inputs_give_equal_bytes(prepare: Prepare) -> None:
    frame = long(("a", "2024-01-01", "D", [1, 2, 3]), ("b", "2024-01-01", "h", [4, 5, 6]))
    first, second = prepare.manifest(frame), prepare.manifest(frame)
    assert first.digest == second.digest
    assert prepare.manifest(frame.assign(target=frame.target + 1)).digest != first.digest


def test_rows_in_any_order_with_gaps_of_two_items(prepare: Prepare) -> None:
    frame = long(("a", "2024-01-01", "D", [1, 2, 3, 4, 5]), ("b", "2024-01-31", "ME", [10, 20, 30, 40]))
    table = prepare(frame.drop([2]).sample(frac=1, random_state=3))
    a, b = table.index("a"), table.index("b")
    np.testing.assert_array_equal(table.target(a), [1, 2, np.nan, 4, 5])
    np.testing.assert_array_equal(table.target(b), [10, 20, 30, 40])
    assert (table.frequencies[a], table.frequencies[b]) == ("D", "ME")


@pytest.mark.parametrize("form", ["parquet", "parquet.zst", "csv.gz", "csv.zst", "folder"])
def test_formats_hold_the_same(produce: Produce, tmp_path: Path, form: str) -> None:
    frame = long(("7", "2024-01-01", "D", [1, 2, 3]), ("NA", "2024-01-01", "D", [4, np.nan, 6]))
    text = frame.to_csv(index=False).encode()
    path = tmp_path / f"in.{form}"
    parquet = tmp_path / "whole"
    frame.to_parquet(parquet)
    if form == "folder":
        path.mkdir()
        frame[:3].to_csv(path / "1.csv", index=False)
        frame[3:].to_parquet(path / "2.parquet")
        (path / "README.md").write_text("not a table")
    elif form == "parquet":
        path.write_bytes(parquet.read_bytes())
    elif form == "parquet.zst":
        path.write_bytes(zstandard.compress(parquet.read_bytes()))
    else:
        path.write_bytes(gzip.compress(text) if form.endswith("gz") else zstandard.compress(text))
    table = open_series(produce(prepare_series, config(path)))
    assert table.item_ids == ["7", "NA"]
    np.testing.assert_array_equal(table.target(1), [4, np.nan, 6])


def test_other_columns_formats_and_a_table_of_one_series(prepare: Prepare) -> None:
    text = "when;sold;note\n03.01.2024;3;\n01.01.2024;1;x\n02.01.2024;;y\n"
    names = {"item_id": None, "timestamp": "when", "target": "sold", "delimiter": ";"}
    table = prepare(text, **names, timestamp_format="%d.%m.%Y")
    assert table.item_ids == ["sold"]
    np.testing.assert_array_equal(table.target(0), [1, np.nan, 3])


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.date32(), pa.string(), pa.int64()]
)
def test_timestamps_of_parquet(produce: Produce, tmp_path: Path, kind: pa.DataType) -> None:
    times = pa.array(pd.date_range("2024-01-01", periods=3)).cast(pa.timestamp("us"))
    values = times.cast(pa.date32()) if kind == pa.date32() else times
    if pa.types.is_string(kind):
        values = values.cast(kind)
    elif pa.types.is_timestamp(kind):
        values = values.cast(pa.timestamp(kind.unit)).cast(kind)
    years = kind == pa.int64()
    values = pa.array([2022, 2023, 2024]) if years else values
    names, target = pa.array([5, 5, 5]), pa.array([1, None, 3], pa.int32())
    pq.write_table(pa.table({"item_id": names, "timestamp": values, "target": target}), tmp_path / "a.parquet")
    more = {"timestamp_format": "%Y"} if years else {}
    table = open_series(produce(prepare_series, config(tmp_path / "a.parquet", **more)))
    assert table.starts[0] == np.datetime64("2022-01-01" if years else "2024-01-01")
    assert table.item_ids == ["5"]
    np.testing.assert_array_equal(table.target(0), [1, np.nan, 3])


def test_offsets_become_the_time_of_a_zone(prepare: Prepare) -> None:
    days = pd.date_range("2024-03-29", periods=5, freq="D", tz="Europe/Berlin")  # the clock changes within
    text = "item_id,timestamp,target\n" + "".join(f"a,{day.isoformat()},{n}\n" for n, day in enumerate(days))
    table = prepare(text, timezone="Europe/Berlin")
    assert (table.frequencies, table.starts[0]) == (["D"], np.datetime64("2024-03-29"))
    with pytest.raises(UserError, match=r"irregular timestamps, off the grid of D from 2024-03-28 23:00:00"):
        prepare(text)
    hours = pd.date_range("2024-10-27", periods=4, freq="h", tz="Europe/Berlin")
    text = "item_id,timestamp,target\n" + "".join(f"a,{hour.isoformat()},1\n" for hour in hours)
    assert prepare(text).starts[0] == np.datetime64("2024-10-26T22:00")
    with pytest.raises(UserError, match="two rows for one item and timestamp"):
        prepare(text, timezone="Europe/Berlin")


def test_covariates_past_and_known_ahead(prepare: Prepare) -> None:
    frame = long(("a", "2024-01-01", "D", [1, 2, 3, np.nan, np.nan]), ("b", "2024-01-01", "D", [4, np.nan, 6]))
    frame["price"] = [1, 2, 3, 4, 5, 6, 7, 8]
    frame["sky"] = ["sun", "", "rain", "", "", "rain", "sun", "sun"]
    frame["holiday"] = [True, False] * 4
    table = prepare(frame, past_covariates=["sky"], known_covariates=["price", "holiday"])
    assert (table.past_names, table.known_names) == (("sky",), ("price", "holiday"))
    np.testing.assert_array_equal(table.target(0), [1, 2, 3])
    np.testing.assert_array_equal(table.target(1), [4, np.nan, 6])
    np.testing.assert_array_equal(table.covariate(0, "price"), [1, 2, 3, 4, 5])
    assert table.covariate(0, "sky").tolist() == ["sun", None, "rain"]
    context = table.context(0, horizon=2)
    np.testing.assert_array_equal(context.future["holiday"], [0, 1])
    frame.loc[3, "price"] = np.nan
    table = prepare(frame, past_covariates=["sky"], known_covariates=["price", "holiday"])
    np.testing.assert_array_equal(table.context(0, horizon=2).future["price"], [np.nan, 5])
    # Without covariates that are known ahead, a missing end is a missing end.
    assert prepare(frame, past_covariates=["sky"]).lengths.tolist() == [5, 3]


@pytest.mark.parametrize(
    ("policy", "values", "price"),
    [
        ("first", [1, 2, 6], [10, 20, 40]),
        ("last", [1, 4, 6], [10, 30, 40]),
        ("mean", [1, 3, 6], [10, 25, 40]),
        ("sum", [1, 6, 6], [10, 25, 40]),
    ],
)
def test_duplicates_are_merged_when_asked_for(
    prepare: Prepare, policy: str, values: list[float], price: list[float]
) -> None:
    text = (
        "item_id,timestamp,target,price\na,2024-01-01,1,10\na,2024-01-02,2,20\na,2024-01-02,4,30\na,2024-01-03,6,40\n"
    )
    manifest = prepare.manifest(text, duplicates=policy, past_covariates=["price"])
    table = open_series(manifest)
    np.testing.assert_array_equal(table.target(0), values)
    np.testing.assert_array_equal(table.covariate(0, "price"), price)
    assert manifest.counts["duplicate_rows"] == 1


def test_irregular_times_are_rounded_when_asked_for(prepare: Prepare) -> None:
    times = ["2024-01-02 10:00", "2024-01-30 09:00", "2024-02-15", "2024-04-01"]
    frame = Frame({"item_id": "a", "timestamp": times, "target": [1, 2, 3, 4]})
    manifest = prepare.manifest(frame, frequency="MS", irregular="round", duplicates="sum")
    table = open_series(manifest)
    np.testing.assert_array_equal(table.target(0), [3, 3, np.nan, 4])
    assert manifest.counts["rounded_rows"] == 3
    assert manifest.counts["filled_gaps"] == 1


def test_faulty_series_are_dropped_when_asked_for(prepare: Prepare) -> None:
    frame = long(
        ("empty", "2024-01-01", "D", [np.nan] * 6),
        ("good", "2024-01-01", "D", [1, 2, 3, 4, np.inf, 6]),
        ("short", "2024-01-01", "D", [1, 2]),
        ("flat", "2024-01-01", "D", [7] * 6),
        ("single", "2024-01-01", "D", [7]),
    )
    drop = dict.fromkeys(("all_missing", "too_short", "constant"), "drop")
    manifest = prepare.manifest(frame, **drop, infinite="missing", min_context=2)
    table = open_series(manifest)
    assert table.item_ids == ["good"]
    np.testing.assert_array_equal(table.target(0), [1, 2, 3, 4, np.nan, 6])
    expected = {"dropped_all_missing": 1, "dropped_too_short": 2, "dropped_constant": 1, "infinite": 1}
    assert expected.items() <= manifest.counts.items()
    assert "| empty | all missing |" in manifest.path("report.md").read_text()
    with pytest.raises(UserError, match=r"none of 5 series is left \(all_missing 1, constant 1, too_short 3\)"):
        prepare(frame, **drop, infinite="missing", min_context=5)


def test_a_constant_series_is_kept_and_counted(prepare: Prepare) -> None:
    manifest = prepare.manifest(long(("flat", "2024-01-01", "D", [7] * 6)))
    assert manifest.counts["constant_series"] == 1


def test_one_row_takes_the_frequency_that_all_others_have(prepare: Prepare) -> None:
    frame = long(("a", "2024-01-01", "D", [1, 2, 3]), ("b", "2024-01-05", "D", [4]))
    table = prepare(frame, windows=0)
    assert table.frequencies == ["D", "D"]
    with pytest.raises(UserError, match=r"^series\.frequency: items with one row.*'b'; set series\.frequency"):
        prepare(
            long(("a", "2024-01-01", "D", [1, 2]), ("c", "2024-01-01", "h", [1, 2]), ("b", "2024-01-05", "D", [4]))
        )


def test_a_bucket(produce: Produce, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    values = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="series")
        text = long(("a", "2024-01-01", "D", [1, 2, 3])).to_csv(index=False).encode()
        client.put_object(Bucket="series", Key="daily/a.csv.gz", Body=gzip.compress(text))
        client.put_object(Bucket="series", Key="daily/b.txt", Body=b"")
        source = {"type": "s3", "uri": "s3://series/daily", "endpoint_url": endpoint}
        settings = SeriesConfig.model_validate({"source": source, "horizon": 1, "min_context": 1})
        assert "1 objects" in settings.fingerprint()
        assert open_series(produce(prepare_series, settings)).target(0).tolist() == [1, 2, 3]
    finally:
        server.stop()


@pytest.mark.slow
def test_a_hundred_thousand_series(produce: Produce, tmp_path: Path) -> None:
    """Shuffled, with gaps; checked against pandas."""
    random, count, length = np.random.default_rng(0), 100_000, 12
    frame = Frame(
        {
            "item_id": np.repeat(np.arange(count), length),
            "timestamp": np.tile(pd.date_range("2024-01-01", periods=length, freq="MS"), count),
            "target": random.normal(size=count * length),
        }
    )
    kept = frame[random.random(len(frame)) > 0.05].sample(frac=1, random_state=0)
    kept.to_parquet(tmp_path / "a.parquet")
    drop = {"frequency": "MS", "too_short": "drop", "min_context": 6}
    manifest = produce(prepare_series, config(tmp_path / "a.parquet", **drop))
    table = open_series(manifest)
    assert len(table) > 90_000
    assert len(table) + manifest.counts["dropped_too_short"] == count
    observed = kept.groupby("item_id")["target"].agg(["count", "sum"])
    for number in random.integers(0, len(table), 300):
        expected = observed.loc[int(table.item_ids[number])]
        values = table.target(number)
        assert (~np.isnan(values)).sum() == expected["count"]
        assert np.nansum(values) == pytest.approx(expected["sum"])


def test_a_fingerprint_names_versions() -> None:
    source = {"type": "packaged", "names": ["nile", "air_passengers"]}
    text = SeriesConfig.model_validate({"source": source, "horizon": 1}).fingerprint()
    assert text.startswith("packaged:statsforecast ")
    assert ",statsmodels " in text
