"""How what a run makes in SageMaker is told apart."""

from __future__ import annotations

import os

from modelmill.components.core import events


def current_run() -> str:
    """Id of the run this step belongs to: the cluster's, the name of the run's folder, or `alone`."""
    folder = events.run_directory()
    return os.environ.get(events.RUN_ID_VARIABLE) or (folder.name if folder else "alone")
