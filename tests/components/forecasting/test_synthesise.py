"""Step `synthesise_series`: the same series however they are made, and mixtures that leave the backtest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.series_config import SynthesisConfig
from modelmill.components.forecasting.series_table import FILE, Points, SeriesWriter, open_series
from modelmill.components.forecasting.synthesise import synthesise_series

from .conftest import Produce


def synthesis(**values: Any) -> SynthesisConfig:
    return SynthesisConfig.model_validate(values)


@pytest.fixture
def given(tmp_path: Path) -> Manifest:
    """Three series with two windows of five points held back: noise with a gap, zeros, and one that is too short."""
    folder = tmp_path / "given"
    folder.mkdir()
    values = np.random.default_rng(0).normal(5.0, 1.0, 70)
    values[10] = np.nan
    lengths = [70, 50, 15]
    with SeriesWriter(folder / FILE) as writer:
        starts = np.full(3, np.datetime64("2024-01-01", "ns"))
        points = Points(np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([values, np.zeros(50), np.ones(15)]))
        writer.append(["noise", "zeros", "short"], starts, ["D"] * 3, np.full(3, 7), points)
    return Manifest.describe(folder, kind="series", metadata={"horizon": 5, "windows": 2})


def test_series_do_not_depend_on_the_number_of_processes(produce: Produce) -> None:
    settings = {"kernel": {"count": 300, "length": 24}, "seed": 3}
    alone = produce(synthesise_series, synthesis(**settings, workers=1))
    together = produce(synthesise_series, synthesis(**settings, workers=2))
    assert alone.digest == together.digest
    assert alone.counts == {
        "series": 300,
        "points": 7200,
        "missing_points": 0,
        "kernel_series": 300,
        "mixup_series": 0,
    }


def test_the_first_of_many_are_those_of_few_and_a_seed_changes_all(produce: Produce) -> None:
    tables = [
        open_series(produce(synthesise_series, synthesis(kernel={"count": count, "length": 24}, seed=seed)))
        for count, seed in ((5, 0), (8, 0), (5, 1))
    ]
    few, many, other = tables
    for series in range(5):
        np.testing.assert_array_equal(few.target(series), many.target(series))
        assert not np.array_equal(few.target(series), other.target(series))
    assert many.item_ids[-1] == "kernel-7"
    assert (few.horizon, few.windows, few.frequencies[0], few.season_lengths[0]) == (0, 0, "h", 24)
    assert few.train(0).shape == (24,)


def test_what_a_series_is_made_of_is_kept(produce: Produce, given: Manifest) -> None:
    settings = synthesis(kernel={"count": 4, "length": 16, "max_kernels": 1}, mixup={"count": 6, "min_length": 30})
    manifest = produce(synthesise_series, settings, series=given)
    rows = pq.read_table(manifest.path("series.parquet")).to_pylist()
    assert [row["item_id"] for row in rows] == [f"kernel-{n}" for n in range(4)] + [f"mixup-{n}" for n in range(6)]
    assert not any(" " in row["made_of"] for row in rows[:4])
    assert all("noise" in row["made_of"] or "zeros" in row["made_of"] for row in rows[4:])
    assert manifest.metadata["method"] == "kernel-synth+ts-mixup"
    assert manifest.metadata["dataset_digest"] == open_series(manifest).digest()


def test_one_series_is_cut_out_and_scaled(produce: Produce, given: Manifest) -> None:
    settings = synthesis(mixup={"count": 30, "max_series": 1, "min_length": 30, "max_length": 45})
    manifest = produce(synthesise_series, settings, series=given)
    table, source = open_series(manifest), open_series(given)
    made_of = pq.read_table(manifest.path("series.parquet"))["made_of"].to_pylist()
    whole = source.train(0)
    assert set(made_of) == {"1.000 noise", "1.000 zeros"}
    assert len(set(table.lengths.tolist())) > 5
    assert table.lengths.min() >= 30
    assert table.lengths.max() <= 45
    for series, text in enumerate(made_of):
        values = table.target(series)
        if text == "1.000 zeros":
            np.testing.assert_array_equal(values, np.zeros(len(values)))
            continue
        assert np.nanmean(np.abs(values)) == pytest.approx(1.0)
        pieces = np.lib.stride_tricks.sliding_window_view(whole, len(values))
        scaled = pieces / np.nanmean(np.abs(pieces), axis=1, keepdims=True)
        assert any(np.allclose(values, piece, equal_nan=True) for piece in scaled)


def test_mixtures_never_see_what_is_held_back(produce: Produce, given: Manifest, tmp_path: Path) -> None:
    settings = synthesis(mixup={"count": 40, "min_length": 30})
    before = produce(synthesise_series, settings, series=given)
    spiked = tmp_path / "spiked"
    spiked.mkdir()
    source = open_series(given)
    values = [source.target(series).copy() for series in range(3)]
    for target in values:
        target[-10:] = 1e9
    with SeriesWriter(spiked / FILE) as writer:
        offsets = np.concatenate([[0], np.cumsum(source.lengths)])
        points = Points(offsets, np.concatenate(values))
        writer.append(source.item_ids, source.starts, source.frequencies, source.season_lengths, points)
    manifest = Manifest.describe(spiked, kind="series", metadata=given.metadata)
    assert produce(synthesise_series, settings, series=manifest).digest == before.digest


def test_a_mixture_is_the_weighted_mean_of_its_parts(produce: Produce, given: Manifest) -> None:
    """Zeros stay zeros, so of a mixture of noise and zeros the noise's weight is left."""
    settings = synthesis(mixup={"count": 60, "max_series": 2, "min_length": 40, "max_length": 40})
    manifest = produce(synthesise_series, settings, series=given)
    table = open_series(manifest)
    made_of = pq.read_table(manifest.path("series.parquet"))["made_of"].to_pylist()
    mixed = [(series, text) for series, text in enumerate(made_of) if "noise" in text and "zeros" in text]
    assert len(mixed) > 5
    for series, text in mixed:
        weights = {name: float(weight) for weight, name in (part.split() for part in text.split(" + "))}
        assert sum(weights.values()) == pytest.approx(1.0, abs=1.1e-3)
        assert np.nanmean(np.abs(table.target(series))) == pytest.approx(weights["noise"], abs=1e-3)


@pytest.mark.parametrize(
    ("mixup", "with_series", "message"),
    [
        ({"count": 1}, False, r"^synthesis\.mixup: no series to mix were given"),
        (
            {"count": 1, "min_length": 61},
            True,
            r"^synthesis\.mixup\.min_length: 61, but the longest of 3 series has 60",
        ),
    ],
    ids=["none", "short"],
)
def test_series_that_cannot_be_mixed(
    produce: Produce, given: Manifest, mixup: dict[str, Any], with_series: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        produce(synthesise_series, synthesis(mixup=mixup), **({"series": given} if with_series else {}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "both are null; set at least one"),
        ({"kernel": {"count": 0}}, "greater than or equal to 1"),
        ({"mixup": {"count": 1, "max_length": 5}}, "max_length: 5 is below min_length 128"),
        ({"kernel": {"count": 1}, "frequency": "soon"}, "'soon' is not a frequency"),
    ],
)
def test_sections_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        synthesis(**values)
