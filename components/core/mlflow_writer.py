"""One pipeline run in MLflow: a parent run, a nested run per step and part of one, and the records of their spools.

Everything here may be repeated with the same records: runs are found again by their tags, parameters and tags are
assignments, MLflow keeps one copy of an equal metric point or dataset input, and an artifact overwrites itself.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import mlflow_store
from modelmill.components.core.errors import UserError
from modelmill.components.core.store import local_copy
from modelmill.components.core.tracking import CHILD_MARK, RUN_SPOOL

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "modelmill.run_id"
STEP_TAG = "modelmill.step"
_PARENT_TAG = "mlflow.parentRunId"
# Limits of mlflow/utils/validation.py; longer values are cut here, so that no server refuses the batch they are in.
_METRICS_PER_BATCH, _PARAMS_PER_BATCH = 1000, 100
_KEY_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH, _SOURCE_LENGTH = 250, 6000, 8000, 36, 65535
_FORBIDDEN = re.compile(r"[^\w\-. /:]")
_STATUS = ("FINISHED", "FAILED", "KILLED")

Record = Mapping[str, Any]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as MLflow's flat strings: `{"a": {"b": [1, 2]}}` becomes `{"a.b": "[1, 2]"}`.

    Mappings are followed, also those in lists (`sources.0.path`); a list of plain values stays one value.
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[_key(name)] = _cut(value if isinstance(value, str) else json.dumps(value, default=str), _PARAM_LENGTH)
    return flat


def is_headline(metric: str) -> bool:
    """Whether a step's metric also goes to the parent run, so that a list of runs compares them.

    Qualities on held-out data do, sizes of the held-out data (`test_rows`) do not.
    """
    if metric.endswith(("_bytes", "_documents", "_rows", "_tokens")):
        return False
    return metric.startswith(("test_", "validation_", "perplexity")) or metric.endswith("bits_per_byte")


def _key(name: str) -> str:
    return _FORBIDDEN.sub("_", name)[:_KEY_LENGTH]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


class RunWriter:
    """Writes one pipeline run; made by `RunWriter.open`."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str, parent_run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self.experiment_id, self.parent_run_id = experiment_id, parent_run_id
        self.created = False  # True when MLflow did not know the run before
        self.owns_parent = True  # False below a run that something else opened and will close
        self.step_run_ids: dict[str, str] = {}
        self.on_new_step: Callable[[], None] = lambda: None
        self._open_steps: set[str] = set()
        self._parent_end: int | None = None

    @classmethod
    def open(
        cls,
        client: MlflowClient,
        *,
        run_dir: Path,
        start: Record,
        artifact_root: Path | None,
        outer_run_id: str | None,
    ) -> RunWriter:
        """Find the runs of a pipeline run, or make the parent.

        Args:
            client: of the tracking store.
            run_dir: folder of the run; its name is the run's id.
            start: first `start` record of the run: `name`, `experiment`, `time`.
            artifact_root: see `mlflow_store.experiment_id`.
            outer_run_id: run to log into and nest below (KFP's MLflow plugin sets `MLFLOW_RUN_ID`).
        """
        run_id = str(start.get("run_id") or run_dir.name)
        if outer_run_id:
            experiment = client.get_run(outer_run_id).info.experiment_id
        else:
            experiment = mlflow_store.experiment_id(client, start.get("experiment") or "modelmill", artifact_root)
        found = _search(client, [experiment], run_id)
        parent = outer_run_id or next((run.info.run_id for run in found if STEP_TAG not in run.data.tags), None)
        created = parent is None or (bool(outer_run_id) and not found)
        if parent is None:
            tags = {RUN_TAG: run_id, "mlflow.source.name": "modelmill", "mlflow.source.type": "JOB", **_user()}
            run = client.create_run(
                experiment, start_time=start.get("time", _now()), run_name=str(start.get("name") or run_id), tags=tags
            )
            parent = run.info.run_id
        writer = cls(client, run_id, experiment, parent)
        writer.created, writer.owns_parent = created, not outer_run_id
        # Steps before their parts, which know whose they are by the step's run.
        for run in sorted(found, key=lambda run: CHILD_MARK in run.data.tags.get(STEP_TAG, "")):
            above = {parent, *writer.step_run_ids.values()}
            if run.data.tags.get(_PARENT_TAG) in above and STEP_TAG in run.data.tags:
                writer.step_run_ids[run.data.tags[STEP_TAG]] = run.info.run_id
                if run.info.status == "RUNNING":
                    writer._open_steps.add(run.data.tags[STEP_TAG])
        return writer

    def write(self, spool: str, records: Iterable[Record]) -> list[str]:
        """Write records of one spool.

        Returns:
            Warnings about records MLflow refused; they are skipped, so that they hold up nothing else.

        Raises:
            Exception: the store is unavailable (`mlflow_store.is_outage`); the records can be written again.
        """
        records = list(records)
        target = self.parent_run_id if spool == RUN_SPOOL else self._step_run(spool, records[0])
        batch = _Batch(self, spool, target)
        for record in records:
            kind = str(record.get("type"))
            if kind == "metrics":
                batch.guard(kind, partial(batch.add_metrics, record))
                continue
            if kind in ("start", "end"):
                batch.flush()
            batch.guard(kind, partial(self._write_one, batch, spool, target, record))
        batch.flush()
        return batch.warnings

    def _write_one(self, batch: _Batch, spool: str, target: str, record: Record) -> None:
        kind, is_parent = record["type"], spool == RUN_SPOOL
        if kind == "params":
            self._log_params(batch, target, flatten(record["values"]))
        elif kind == "tags":
            self._set_tags(target, record["values"])
        elif kind == "artifact":
            self._log_artifact(target, Path(record["path"]), record.get("folder") or None)
        elif kind == "dataset":
            self._log_dataset({target, self.parent_run_id}, record)
        elif kind == "start" and (self.owns_parent or not is_parent):
            if not is_parent:
                self._open_steps.add(spool)
            self.client.update_run(target, status="RUNNING")
        elif kind == "end":
            status = record.get("status") if record.get("status") in _STATUS else "FAILED"
            if is_parent:
                self._parent_end = record["time"]
            self._open_steps.discard(spool)
            if self.owns_parent or not is_parent:
                self.client.set_terminated(target, status=status, end_time=record["time"])

    def close_open_steps(self) -> None:
        """Mark steps that were killed without a word, once the run has ended."""
        for step in sorted(self._open_steps):
            self.client.set_terminated(self.step_run_ids[step], status="KILLED", end_time=self._parent_end)
        self._open_steps.clear()

    def _step_run(self, step: str, first: Record) -> str:
        if step not in self.step_run_ids:
            whole, _, part = step.partition(CHILD_MARK)
            above = self._step_run(whole, first) if part else self.parent_run_id
            tags = {RUN_TAG: self.run_id, STEP_TAG: step, _PARENT_TAG: above, **_user()}
            run = self.client.create_run(
                self.experiment_id, start_time=first.get("time", _now()), run_name=part or step, tags=tags
            )
            self.step_run_ids[step] = run.info.run_id
            self._open_steps.add(step)
            self.on_new_step()
        return self.step_run_ids[step]

    def _log_params(self, batch: _Batch, target: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        pairs = list(params.items())
        for begin in range(0, len(pairs), _PARAMS_PER_BATCH):
            part = dict(pairs[begin : begin + _PARAMS_PER_BATCH])
            try:
                self.client.log_batch(target, params=[Param(name, value) for name, value in part.items()])
            except MlflowException as error:
                if mlflow_store.is_outage(error):
                    raise
                held = self.client.get_run(target).data.params  # MLflow never changes a parameter
                changed = sorted(name for name in part if name in held and held[name] != part[name])
                if changed:
                    batch.warn(f"parameters keep their first value: {', '.join(changed)}")
                for name in part.keys() - held.keys():
                    send = partial(self.client.log_batch, target, params=[Param(name, part[name])])
                    batch.guard(f"parameter {name!r}", send)

    def _set_tags(self, target: str, tags: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        made = [RunTag(_key(name), _cut(str(value), _TAG_LENGTH)) for name, value in tags.items()]
        for begin in range(0, len(made), _PARAMS_PER_BATCH):
            self.client.log_batch(target, tags=made[begin : begin + _PARAMS_PER_BATCH])

    def _log_artifact(self, target: str, path: Path, folder: str | None) -> None:
        for candidate in (path, _published(path), path):  # the step may publish its folder between two looks
            try:
                if candidate.is_dir():
                    return self.client.log_artifacts(target, str(candidate), folder or candidate.name)
                if candidate.is_file():
                    return self.client.log_artifact(target, str(candidate), folder)
            except FileNotFoundError:
                continue
        raise ValueError(f"{path} is gone")

    def _log_dataset(self, targets: Iterable[str], record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = str(record["source"])
        dataset = Dataset(
            name=_cut(str(record["name"]), 500),
            digest=str(record["digest"])[:_DIGEST_LENGTH],
            source_type=source.partition("://")[0] if "://" in source else "local",
            source=_cut(json.dumps({"uri": source}), _SOURCE_LENGTH),
            profile=json.dumps(record.get("profile", {})),
        )
        tags = [InputTag("mlflow.data.context", str(record["context"]))]
        for target in targets:
            self.client.log_inputs(target, [DatasetInput(dataset, tags)])


class _Batch:
    """Metrics waiting for one request, and what was refused."""

    def __init__(self, writer: RunWriter, spool: str, target: str) -> None:
        self.writer, self.spool, self.target = writer, spool, target
        self.metrics: list[Any] = []
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(f"{self.spool}: {text}")

    def guard(self, what: str, action: Callable[[], object]) -> None:
        """Run an action; a refusal becomes a warning, an outage of the store goes up."""
        try:
            action()
        except Exception as error:
            if mlflow_store.is_outage(error) and not isinstance(error, FileNotFoundError):
                raise
            self.warn(f"{what} skipped: {mlflow_store.one_line(error)}")

    def add_metrics(self, record: Record) -> None:
        from mlflow.entities import Metric

        for name, value in record["values"].items():
            self.metrics.append(Metric(_key(name), value, record["time"], record["step"]))
        if len(self.metrics) >= _METRICS_PER_BATCH:
            self.flush()

    def flush(self) -> None:
        waiting, self.metrics = self.metrics, []
        for begin in range(0, len(waiting), _METRICS_PER_BATCH):
            self._send(self.target, waiting[begin : begin + _METRICS_PER_BATCH])
        if self.spool != RUN_SPOOL and CHILD_MARK not in self.spool:
            headline = [metric for metric in waiting if is_headline(metric.key)]
            for begin in range(0, len(headline), _METRICS_PER_BATCH):
                self._send(self.writer.parent_run_id, headline[begin : begin + _METRICS_PER_BATCH])

    def _send(self, run_id: str, metrics: list[Any]) -> None:
        client = self.writer.client
        try:
            client.log_batch(run_id, metrics=metrics)
        except Exception as error:
            if mlflow_store.is_outage(error):
                raise
            for metric in metrics:  # find the one it refuses
                self.guard(f"metric {metric.key}", partial(client.log_batch, run_id, metrics=[metric]))


def end_open_runs(client: MlflowClient, run_id: str, status: str) -> int | None:
    """End a pipeline run that nobody else will: its parent and nested runs, as far as they are open.

    Args:
        client: of the tracking store.
        run_id: the pipeline run, in whatever experiment.
        status: `FINISHED`, `FAILED` or `KILLED`.

    Returns:
        How many were open, or None when MLflow has no run of it.

    Raises:
        Exception: the store is unavailable or refuses.
    """
    experiments: list[str] = []
    token, more = None, True
    while more:
        page = client.search_experiments(page_token=token)
        experiments += [each.experiment_id for each in page]
        token, more = page.token, bool(page.token)
    found = _search(client, experiments, run_id)
    waiting = [run for run in found if run.info.status not in _STATUS]
    # The parent last: when this is cut off, it still shows that the run was not ended.
    for run in sorted(waiting, key=lambda run: STEP_TAG not in run.data.tags):
        client.set_terminated(run.info.run_id, status=status)
    return len(waiting) if found else None


def _search(client: MlflowClient, experiments: list[str], run_id: str) -> list[Any]:
    """The parent and nested runs of a pipeline run that MLflow has."""
    found: list[Any] = []
    token = None
    while True:
        quoted = run_id.replace("'", "")
        page = client.search_runs(experiments, f"tags.`{RUN_TAG}` = '{quoted}'", max_results=1000, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return found


def _now() -> int:
    return int(time.time() * 1000)


def _published(path: Path) -> Path:
    """Where a file of an unfinished step output is once the step has published it (see `core.store`)."""
    try:
        return local_copy(Path(*(part.removesuffix(".partial") for part in path.parts)))
    except UserError:  # in S3, which does not answer
        return path


def _user() -> dict[str, str]:
    try:
        return {"mlflow.user": os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()}
    except (OSError, KeyError):  # a container's user id without a name
        return {}
