"""Tracking calls for steps: each appends a line to the step's spool, and one process delivers them.

Opening an MLflow run costs seconds and a server may be down, so a step never talks to MLflow for its
parameters and metrics: it writes to `<run>/spool/<step>.jsonl` and goes on. Outside a run every call
does nothing, so a step function can be called from a test or a notebook as it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core.events import STEP_VARIABLE, append_line, read_lines, run_directory

if TYPE_CHECKING:
    from modelmill.components.core.manifest import Manifest

RUN_SPOOL = "_run"  # records of the pipeline run itself, the parent of the steps
CHILD_VARIABLE = "MODELMILL_TRACKING_CHILD"  # part of a step with a run of its own; its processes inherit it
CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}  # of a split, as MLflow calls it
CHILD_MARK = "."  # between step and part in the name of a spool; a step's name has none

Point = tuple[str, int, float]  # name, step and value of one metric


def spool_path(step: str | None = None) -> Path | None:
    """Spool file of a step (default: the current one), or None outside a run."""
    folder = run_directory()
    name = step or os.environ.get(STEP_VARIABLE)
    if name and not step and (child := os.environ.get(CHILD_VARIABLE)):
        name = f"{name}{CHILD_MARK}{child}"
    return folder / "spool" / f"{name}.jsonl" if folder and name else None


def record(kind: str, *, spool: str | None = None, **fields: Any) -> None:
    """Append one record of a kind the delivery process knows (`start`, `params`, `metrics`, ...)."""
    path = spool_path(spool)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, {"type": kind, "time": int(time.time() * 1000), **fields})


class Child:
    """How a part of a step ended; `FINISHED` unless said otherwise."""

    status = "FINISHED"


@contextmanager
def child(name: str) -> Iterator[Child]:
    """Send what this process and its children record to a run of its own below the step's, until the block ends.

    For parts that are compared with one another, such as the trials of a search. A name that comes again goes on with
    its run, as a resumed step does. Progress and log lines stay the step's.

    Args:
        name: of the part, unique in the step; letters, digits and dashes.

    Yields:
        Where the block says how the part ended: `FINISHED`, `FAILED` or `KILLED`. An exception is `FAILED`.
    """
    before = os.environ.get(CHILD_VARIABLE)
    os.environ[CHILD_VARIABLE] = name
    outcome = Child()
    folder = run_directory()
    try:
        record("start", run=folder.name if folder else "")
        try:
            yield outcome
        except BaseException:
            outcome.status = "FAILED"
            raise
        finally:
            record("end", status=outcome.status)
    finally:
        if before is None:
            del os.environ[CHILD_VARIABLE]
        else:
            os.environ[CHILD_VARIABLE] = before


def points_before(spool: Path, offset: int) -> set[Point]:
    """Points of a spool's records that end at or before a byte offset.

    A step that goes on from a checkpoint reports the points after it a second time. Those that came out equal are
    one point: whoever reads past a second `start` record drops what is in this set.
    """
    points: set[Point] = set()
    for end, line in read_lines(spool):
        if end > offset:
            break
        if line.get("type") == "metrics":
            points.update((name, line["step"], value) for name, value in line["values"].items())
    return points


def log_params(values: Mapping[str, Any]) -> None:
    """Parameters of the step; nested mappings are flattened with dots by the delivery."""
    record("params", values=dict(values))


def log_metrics(values: Mapping[str, float], step: int = 0) -> None:
    """Metrics at an optimizer step (or 0 for a summary)."""
    record("metrics", values={name: float(value) for name, value in values.items()}, step=step)


def set_tags(values: Mapping[str, str]) -> None:
    """Tags of the step's run."""
    record("tags", values=dict(values))


def log_artifact(path: Path | str, folder: str = "") -> None:
    """A file to keep with the step's run; it must still exist when the spool is delivered."""
    record("artifact", path=str(Path(path).absolute()), folder=folder)


def log_dataset(*, name: str, digest: str, source: str, context: str, profile: Mapping[str, Any]) -> None:
    """The data a step used or made, as an MLflow dataset input.

    Args:
        name: what people call it.
        digest: content digest; MLflow keeps the first 36 characters.
        source: URI it can be read from.
        context: `training`, `validation` or `test`.
        profile: counts such as rows, tokens and bytes.
    """
    record("dataset", name=name, digest=digest, source=source, context=context, profile=dict(profile))


def log_splits(data: Manifest, splits: Iterable[str], *, name: str, suffix: str, units: Iterable[str]) -> None:
    """Splits of prepared data that a step uses, with the digests of their files.

    Args:
        data: its manifest.
        splits: train, validation or test.
        name: what people call it.
        suffix: of a split's file.
        units: what its splits are counted in, in the manifest as `<split>_<unit>`.
    """
    digests, units = {entry.path: entry.sha256 for entry in data.files}, list(units)
    for split in splits:
        log_dataset(
            name=f"{name}-{split}",
            digest=digests[f"{split}{suffix}"],
            source=data.uri,
            context=CONTEXTS[split],
            profile={unit: data.counts[f"{split}_{unit}"] for unit in units},
        )
