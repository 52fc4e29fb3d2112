"""Step `publish_forecasts`: put a forecast where its readers, and later its judge, find it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from modelmill.components.core import tracking
from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.forecasting.archive import KEY, ForecastName, open_archive
from modelmill.components.forecasting.drift_config import PublishConfig
from modelmill.components.forecasting.forecast import FILE
from modelmill.components.forecasting.series_table import SeriesTable, open_series
from modelmill.components.forecasting.windows import stamps

logger = logging.getLogger("modelmill")
_FACTS = ("weights_digest", "horizon", "quantiles", "model")


@step_options(reuse=False)
def publish_forecasts(
    config: PublishConfig, output: Path, *, forecasts: Manifest, series: Manifest, replaced: Manifest | None = None
) -> StepResult:
    """Add a forecast to the archive, once; what was published before stays.

    Args:
        config: where.
        output: an empty folder; takes the published file.
        forecasts: manifest of `forecast`.
        series: manifest of the series that were forecast.
        replaced: manifest of an earlier publication, whose place this forecast takes for readers; the file then names
            it as `replaces`.

    Returns:
        kind `published`; metadata `name` of the file in the archive, `known_until`, `replaces` (a file's name, else
        empty); counts `published` (0 where it was there already).

    Raises:
        UserError: the forecast is of other series, or the archive cannot be written.
    """
    if forecasts.kind != "forecasts" or forecasts.metadata.get("dataset_digest") != series.digest:
        raise UserError("forecasts: they are no forecast of these series; give the output of forecast on them")
    until = last_stamp(open_series(series))
    facts = {name: forecasts.metadata[name] for name in _FACTS}
    name = ForecastName.of(until, facts["weights_digest"], [_content(series), facts["horizon"], facts["quantiles"]])
    table = pq.read_table(forecasts.path(FILE))
    replaces = "" if replaced is None else str(replaced.metadata["name"])
    replaces = "" if replaces == name.file else replaces  # a model that came out as it was before
    more = {"replaces": replaces} if replaces else {}
    told = json.dumps({**facts, "known_until": until, **more}, sort_keys=True).encode()
    pq.write_table(table.replace_schema_metadata({KEY: told}), output / FILE)
    added = open_archive(config).add(name, output / FILE)
    where = f" in place of {replaces}" if replaces else ""
    logger.info("%s is %s%s", name.file, "published" if added else "published already", where)
    tracking.set_tags({"modelmill.published": name.file})
    metadata = {"name": name.file, "known_until": until, "replaces": replaces}
    return StepResult("published", counts={"published": int(added)}, metadata=metadata)


def last_stamp(table: SeriesTable) -> str:
    """The latest timestamp of any series, as `20240131T000000`."""
    last = stamps(table, np.arange(len(table)), np.maximum(table.lengths - 1, 0)).max()
    return str(np.datetime_as_string(last, unit="s")).replace("-", "").replace(":", "")


def _content(series: Manifest) -> str:
    return str(series.metadata.get("dataset_digest", series.digest))
