"""Where things lie on one machine: `.modelmill/` below the working directory, or `$MODELMILL_HOME`.

mlflow.db, mlartifacts/   the embedded tracking store
runs/<run id>/            recipe, state, events, logs, tracking spool and KFP workspace of one run
store/<step>/<key>/       finished step outputs, addressed by what produced them
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

HOME_VARIABLE = "MODELMILL_HOME"


@dataclass(frozen=True)
class Home:
    """The folder that holds runs, step outputs and the embedded tracking store."""

    root: Path

    @classmethod
    def current(cls) -> Home:
        return cls(Path(os.environ.get(HOME_VARIABLE) or ".modelmill").absolute())

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def tracking_uri(self) -> str:
        """`$MLFLOW_TRACKING_URI`, else a SQLite file (MLflow's own file store is in maintenance mode)."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def artifact_root(self) -> Path:
        """Artifacts of the embedded store; a tracking server decides for itself."""
        return self.root / "mlartifacts"
