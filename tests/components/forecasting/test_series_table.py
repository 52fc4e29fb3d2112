"""Reading and writing the `series` artifact."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.frequency import Frequency, parse_frequency
from modelmill.components.forecasting.series_table import FILE, Points, SeriesTable, SeriesWriter, open_series


def write(folder: Path) -> Path:
    starts = np.array(["2024-01-01", "2024-01-31"], "datetime64[ns]")
    with SeriesWriter(folder / FILE) as writer:
        for shift in (0.0, 100.0):
            text = pa.array(["sun", None, "rain", "sun", "sun"]).dictionary_encode()
            writer.append(
                [f"a{shift:.0f}", f"b{shift:.0f}"],
                starts,
                ["D", "ME"],
                np.array([7, 12]),
                Points(np.array([0, 3, 5]), np.array([1.0, np.nan, 3.0, 4.0, 5.0]) + shift),
                {
                    "past:weather": Points(np.array([0, 3, 5]), text),
                    "known:price": Points(np.array([0, 5, 7]), np.arange(7.0)),
                },
            )
    return folder / FILE


def test_what_is_written_is_read_back_as_views(tmp_path: Path) -> None:
    table = SeriesTable(write(tmp_path), horizon=1, windows=2)
    assert len(table) == 4
    assert table.item_ids == ["a0", "b0", "a100", "b100"]
    assert table.lengths.tolist() == [3, 2, 3, 2]
    assert table.season_lengths.tolist() == [7, 12, 7, 12]
    assert table.index("b100") == 3
    target = table.target(2)
    np.testing.assert_array_equal(target, [101.0, np.nan, 103.0])
    assert not target.flags.owndata
    assert not target.flags.writeable
    np.testing.assert_array_equal(table.target(-1), [104.0, 105.0])
    np.testing.assert_array_equal(table.covariate(1, "price"), [5.0, 6.0])
    assert table.covariate(0, "weather").tolist() == ["sun", None, "rain"]
    assert [str(day.date()) for day in table.timestamps(1, 1, 4)] == ["2024-02-29", "2024-03-31", "2024-04-30"]


def test_a_table_is_small_to_send_to_another_process(tmp_path: Path) -> None:
    sent = pickle.dumps(SeriesTable(write(tmp_path), horizon=1, windows=2))
    assert len(sent) < 1000
    table = pickle.loads(sent)
    assert (table.horizon, table.windows) == (1, 2)
    np.testing.assert_array_equal(table.target(2), [101.0, np.nan, 103.0])


def test_a_digest_is_of_the_content_and_not_of_the_batches(tmp_path: Path) -> None:
    texts, starts = ["a", "b"], np.full(2, np.datetime64("2024-01-01", "ns"))
    values, seasons, digests = np.arange(5.0), np.array([7, 7]), []
    for split, last in ((True, 4.0), (False, 4.0), (False, 5.0)):
        values[-1] = last
        path = tmp_path / f"{split}{last}.arrow"
        with SeriesWriter(path) as writer:
            if split:
                writer.append(texts[:1], starts[:1], ["D"], seasons[:1], Points(np.array([0, 2]), values[:2]))
                writer.append(texts[1:], starts[1:], ["D"], seasons[1:], Points(np.array([0, 3]), values[2:]))
            else:
                writer.append(texts, starts, ["D", "D"], seasons, Points(np.array([0, 2, 5]), values))
        digests.append(SeriesTable(path).digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_context_holds_nothing_from_its_origin_on_but_known_covariates(tmp_path: Path) -> None:
    table = SeriesTable(write(tmp_path), horizon=1, windows=2)
    assert table.origins(0) == [1, 2]
    np.testing.assert_array_equal(table.train(0), [1.0])
    context = table.context(0, 2, horizon=3, max_length=1)
    np.testing.assert_array_equal(context.target, [np.nan])
    assert context.past["weather"].tolist() == [None]
    np.testing.assert_array_equal(context.past["price"], [1.0])
    np.testing.assert_array_equal(context.future["price"], [2.0, 3.0, 4.0])
    assert "weather" not in context.future
    np.testing.assert_array_equal(table.actual(0, 2), [3.0])
    assert table.context(0, horizon=2).target.shape == (3,)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda table: table.context(0, horizon=3), "2 of 3 future values of 'price'"),
        (lambda table: table.context(0, 4), "origin 4 of a0 lies outside its 3 points"),
        (lambda table: table.covariate(0, "wind"), "no covariate 'wind'; the covariates are weather, price"),
        (lambda table: table.index("c"), "no item 'c' among 4"),
    ],
    ids=["horizon", "origin", "covariate", "item"],
)
def test_what_is_not_there_is_named(tmp_path: Path, act, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        act(SeriesTable(write(tmp_path)))


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of kind 'corpus'"):
        open_series(Manifest(kind="corpus", uri=str(tmp_path), files=[]))


@pytest.mark.parametrize(
    ("alias", "canonical", "season"),
    [
        ("H", "h", 24),
        ("15min", "15min", 96),
        ("7min", "7min", 1),
        ("D", "D", 7),
        ("2D", "2D", 1),
        ("B", "B", 5),
        ("W", "W-SUN", 1),
        ("W-WED", "W-WED", 1),
        ("M", "ME", 12),
        ("MS", "MS", 12),
        ("2MS", "2MS", 6),
        ("Q", "QE-DEC", 4),
        ("QS-OCT", "QS-OCT", 4),
        ("YS", "YS-JAN", 1),
        ("A", "YE-DEC", 1),
    ],
)
def test_aliases(alias: str, canonical: str, season: int) -> None:
    frequency = parse_frequency(alias)
    assert (frequency.alias, frequency.season_length) == (canonical, season)
    assert parse_frequency(canonical) == frequency


@pytest.mark.parametrize("alias", ["", "fortnight", "0D", "W-JAN", "D-SUN", "3B", "QE-SUN", "-1D", "h5"])
def test_what_is_no_frequency(alias: str) -> None:
    with pytest.raises(UserError, match=r"series\.frequency: .* is not a frequency"):
        parse_frequency(alias)


def test_frequencies_say_how_long_a_step_is() -> None:
    assert Frequency("W", 2, point=6).nanoseconds == 14 * 86_400 * 10**9
    assert Frequency("Q", 1, "E", 12).months == 3
    assert Frequency("B", 1).nanoseconds == Frequency("B", 1).months == 0
