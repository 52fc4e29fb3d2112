"""A model's manifest as a forecaster. Torch-free until one is opened."""

from __future__ import annotations

from collections.abc import Callable

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.model_folder import model_folder
from modelmill.components.forecasting.chronos_model import read_chronos
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.forecaster import Forecaster


def open_forecaster(
    model: Manifest, config: ChronosUseConfig | None = None, *, report: Callable[[int], None] = lambda done: None
) -> Forecaster:
    """Load the Chronos of a manifest (`model/`).

    Args:
        model: what `fetch_model` or `train_chronos` made.
        config: how it is run; default, as `ChronosUseConfig` says.
        report: called after every batch with the number of series that it forecast.

    Raises:
        UserError: the folder holds no Chronos or lacks weights, there is no such device, or the section asks for what
            this model cannot do.
    """
    config, folder = config or ChronosUseConfig(), model_folder(model)
    family = read_chronos(folder).family
    if family != "chronos-2" and config.covariates:
        raise UserError(f"covariates: {', '.join(config.covariates)}, but a {family} reads none; use a Chronos-2")
    if family != "chronos-2" and config.cross_learning:
        raise UserError(f"cross_learning: true, but a {family} reads each series alone; use a Chronos-2")
    if family != "chronos-t5" and config.num_samples is not None:
        raise UserError(f"num_samples: {config.num_samples}, but a {family} draws no samples; leave it out")
    from modelmill.components.forecasting.chronos_forecasters import load_forecaster

    return load_forecaster(folder, family, config, report)
