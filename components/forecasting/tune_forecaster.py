"""Step `tune_forecaster`: a given Chronos tuned on series, in the way its section says."""

from __future__ import annotations

from pathlib import Path

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.forecasting.tune_config import ForecasterTuneConfig


@step_options(resumable=True, device=True, launches=True)
def tune_forecaster(config: ForecasterTuneConfig, output: Path, *, series: Manifest, base: Manifest) -> StepResult:
    """Tune a Chronos by `train_chronos` or `tune_chronos2`.

    Writes what they write.

    Args:
        config: one of the two ways.
        output: the artifact's folder; an interrupted training goes on in it.
        series: manifest of `prepare_series`.
        base: manifest of the model to start from.

    Returns:
        Of the way that was taken; kind `model`.

    Raises:
        UserError: section, series and base do not fit together, or training diverged.
    """
    # Each way is imported alone: the tuning of a Chronos-2 needs torch in this process.
    if config.chronos2 is not None:
        from modelmill.components.forecasting.tune_chronos2 import tune_chronos2

        return tune_chronos2(config.chronos2, output, series=series, base=base)
    from modelmill.components.forecasting.train_chronos import train_chronos

    assert config.chronos is not None
    return train_chronos(config.chronos, output, series=series, base=base)
