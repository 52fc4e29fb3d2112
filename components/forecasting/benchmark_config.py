"""Section `benchmark` of a recipe: public forecasting benchmarks, from local copies of their data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import json_digest
from modelmill.components.core.recipe import Section
from modelmill.components.forecasting.backtest_config import BaselineName
from modelmill.components.forecasting.forecast_config import ChronosUseConfig


class FevTasks(Section):
    """Tasks of fev (fev-bench) in its YAML format, with their data in local parquet files."""

    type: Literal["fev"]
    tasks: str = Field(min_length=1, description="YAML file with the key `tasks`, as `fev.Benchmark.from_yaml` reads.")
    folder: str | None = Field(
        default=None, description="Where tasks with a `dataset_config` have their data, `<folder>/<dataset_config>/`."
    )

    def fingerprint(self) -> str:
        found = [_state(Path(self.tasks), "benchmark.source.tasks")]
        return json_digest(found + ([] if self.folder is None else _below(self.folder, "parquet")))


class GiftEvalTasks(Section):
    """Data sets of GIFT-Eval, each a folder that the `datasets` library saved."""

    type: Literal["gift-eval"]
    folder: str = Field(min_length=1, description="Folder of the benchmark, with a folder for each data set.")
    datasets: list[str] = Field(min_length=1, description="Data sets, such as m4_yearly or electricity/H.")
    terms: list[Literal["short", "medium", "long"]] = Field(
        default=["short"], min_length=1, description="Horizons: medium is 10, long 15 times as far as short."
    )

    def fingerprint(self) -> str:
        return json_digest(_below(self.folder, "arrow"))


class BenchmarkConfig(Section):
    """A benchmark of several tasks, aggregated over them as fev-bench and GIFT-Eval do."""

    source: Annotated[FevTasks | GiftEvalTasks, Field(discriminator="type")]
    baselines: list[BaselineName] = Field(
        default=["auto-ets", "theta", "lightgbm"], description="Shown beside seasonal-naive, which always is."
    )
    fitted_points: int = Field(
        default=1000, ge=10, description="Most recent points that statistical and boosting baselines are fitted to."
    )
    use: ChronosUseConfig = Field(default=ChronosUseConfig(), description="How the model is run.")
    workers: int | None = Field(
        default=None, ge=1, description="Processes for statistical baselines at most; null: one a core."
    )

    def fingerprint(self) -> str:
        """State of the tasks' files: names, sizes and times.

        Raises:
            UserError: one that the section names does not exist.
        """
        return self.source.fingerprint()


def _below(folder: str, suffix: str) -> list[str]:
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"benchmark.source.folder: {folder} is not a folder; give the one with the benchmark's data")
    return [_state(path, "benchmark.source.folder") for path in sorted(root.rglob(f"*.{suffix}"))]


def _state(path: Path, parameter: str) -> str:
    if not path.is_file():
        raise UserError(f"{parameter}: {path} is not a file; give one that exists")
    found = path.stat()
    return f"{path}:{found.st_size}:{found.st_mtime_ns}"
