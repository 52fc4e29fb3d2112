"""Step `tune_forecaster`: a given Chronos tuned on series, in the way its section says."""

from __future__ import annotations

from pathlib import Path

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import digest_of
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.forecasting.series_profile import write_profile
from modelmill.components.forecasting.series_table import open_series
from modelmill.components.forecasting.tune_config import ForecasterTuneConfig


@step_options(resumable=True, device=True, launches=True)
def tune_forecaster(config: ForecasterTuneConfig, output: Path, *, series: Manifest, base: Manifest) -> StepResult:
    """Tune a Chronos by `train_chronos`, `tune_chronos2` or `search_chronos`.

    Writes what they write, and beside the weights what the series looked like (see `series_profile`).

    Args:
        config: one of the three ways.
        output: the artifact's folder; an interrupted training or search goes on in it.
        series: manifest of `prepare_series`.
        base: manifest of the model to start from.

    Returns:
        Of the way that was taken; kind `model`.

    Raises:
        UserError: section, series and base do not fit together, or training diverged.
    """
    # Each way is imported alone: a search needs optuna, the tuning of a Chronos-2 torch in this process.
    if config.chronos is not None:
        from modelmill.components.forecasting.train_chronos import train_chronos

        return train_chronos(config.chronos, output, series=series, base=base)
    if config.chronos2 is not None:
        from modelmill.components.forecasting.tune_chronos2 import tune_chronos2

        return tune_chronos2(config.chronos2, output, series=series, base=base)
    from modelmill.components.forecasting.search_chronos import search_chronos

    assert config.search is not None
    result = search_chronos(config.search, output, series=series, base=base)
    if result.metadata["weights_digest"] != digest_of(base):  # a base that won keeps what it was tuned on
        write_profile(open_series(series), output / "model")
    return result
