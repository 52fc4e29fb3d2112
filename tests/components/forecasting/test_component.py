"""The shells: what a pipeline runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import section
from modelmill.components.forecasting import component
from modelmill.components.forecasting.series import prepare_series
from modelmill.components.forecasting.series_config import SeriesConfig, SynthesisConfig
from modelmill.components.forecasting.synthesise import synthesise_series


@pytest.fixture
def outputs(tmp_path: Path) -> list[dict[str, SimpleNamespace]]:
    names = ("manifest", "report", "table")
    return [{name: SimpleNamespace(path=str(tmp_path / str(run) / name)) for name in names} for run in range(3)]


def test_series_and_then_mixtures_of_them(outputs: list[dict[str, SimpleNamespace]]) -> None:
    source = {"type": "packaged", "names": ["sunspots", "nile"]}
    config = SeriesConfig.model_validate({"source": source, "horizon": 4})
    text = section("prepare_series", config, prepare_series, config.fingerprint())
    component.prepare_series.python_func(text, **outputs[0])
    manifest = Manifest.read(outputs[0]["manifest"].path)
    assert manifest.counts["series"] == 2
    assert "sunspots" in Path(outputs[0]["report"].path).read_text()
    assert "sunspots" in Path(outputs[0]["table"].path).read_text()
    mixing = SynthesisConfig.model_validate({"mixup": {"count": 3, "min_length": 50}})
    text = section("synthesise_series", mixing, synthesise_series)
    component.synthesise_series.python_func(text, **outputs[1], series=outputs[0]["manifest"])
    mixed = Manifest.read(outputs[1]["manifest"].path)
    assert (mixed.kind, mixed.counts["mixup_series"]) == ("series", 3)
    drawing = SynthesisConfig.model_validate({"kernel": {"count": 2, "length": 16}})
    component.synthesise_series.python_func(section("synthesise_series", drawing, synthesise_series), **outputs[2])
    assert Manifest.read(outputs[2]["manifest"].path).counts["kernel_series"] == 2
