"""Bring what the steps of a run wrote to their spools into MLflow, once each, whatever dies on the way.

    python -m modelmill.components.core.delivery RUN_FOLDER [--follow] [--only STEP]

One parent run per pipeline run (found again by its tag `modelmill.run_id`), one nested run per step. The offset of a
spool is stored after each delivered batch. A batch that was delivered but not yet noted is sent again after a crash:
MLflow drops a metric it holds with the same name, time, step and value, and the rest are assignments.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelmill.components.core import mlflow_store
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.home import Home
from modelmill.components.core.mlflow_store import StoreUnavailable, safe_uri
from modelmill.components.core.mlflow_writer import RunWriter
from modelmill.components.core.tracking import CHILD_MARK, RUN_SPOOL, Point, points_before

logger = logging.getLogger("modelmill")
_CHUNK = 2000  # records read from a spool before its offset is stored
_POLL_SECONDS = 0.3
_ATTEMPTS = 3  # times a run's last records are tried on a store that is down, before they are left for later
_OUTAGE_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)  # pauses while a live run's store is down


@dataclass
class DeliveryReport:
    """What one delivery did.

    Attributes:
        run_id: the pipeline run.
        records: spool records delivered now.
        complete: the run has ended and MLflow holds everything.
        parent_run_id: MLflow run of the pipeline run, once known.
        warnings: one line each; what was skipped and why, or why the delivery stopped.
    """

    run_id: str
    records: int = 0
    complete: bool = False
    parent_run_id: str | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class _State:
    """What is delivered so far, kept in `spool/.delivery.json`."""

    path: Path
    tracking_uri: str
    offsets: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    @classmethod
    def load(cls, run_dir: Path, tracking_uri: str, only: str | None = None) -> _State:
        """State of a run for a store; another store starts from the beginning of the spools."""
        path = run_dir / "spool" / _own(".delivery.json", only)
        kept = _read_json(path)
        if kept.get("tracking_uri") == safe_uri(tracking_uri):
            return cls(path, safe_uri(tracking_uri), dict(kept["offsets"]), bool(kept["complete"]))
        return cls(path, safe_uri(tracking_uri))

    def save(self) -> None:
        content = {"tracking_uri": self.tracking_uri, "offsets": self.offsets, "complete": self.complete}
        _write_json(self.path, content)


def deliver(
    run_dir: Path, tracking_uri: str | None = None, *, follow: bool = False, only: str | None = None
) -> DeliveryReport:
    """Deliver a run's spools to a tracking store.

    Args:
        run_dir: the run's folder.
        tracking_uri: the store; default `Home.current().tracking_uri`.
        follow: keep delivering until the run has ended (or whoever started this process is gone).
        only: deliver one step and leave the others alone: each has an MLflow run of its own to nest below.

    Returns:
        What was done. A store that is down is a warning there, not an error: nothing is lost.

    Raises:
        UserError: the folder is not a run's, MLflow is not installed, or the URI is not one.
    """
    run_dir = Path(run_dir).absolute()
    if not run_dir.is_dir():
        raise UserError(f"run: {run_dir} does not exist; `modelmill runs` lists the runs")
    (run_dir / "spool").mkdir(exist_ok=True)
    uri = tracking_uri or Home.current().tracking_uri
    with _alone(run_dir, wait=True, only=only):
        delivery = _Delivery(run_dir, uri, only)
        _follow(delivery) if follow else _drain(delivery, _ATTEMPTS)
        return delivery.report


def deliver_pending(home: Home) -> list[DeliveryReport]:
    """Deliver every run of a home that MLflow does not hold completely, each to the store it belongs to.

    A run that another process is delivering is left to it, and a store that is down is tried once.
    """
    reports: list[DeliveryReport] = []
    down: set[str] = set()
    for spool in sorted(home.runs.glob("*/spool")):
        kept = _read_json(spool / ".delivery.json")
        if kept.get("complete") and not _unread(spool.glob("*.jsonl"), kept.get("offsets", {})):
            continue
        uri = kept.get("tracking_uri")
        uri = home.tracking_uri if uri in (None, safe_uri(home.tracking_uri)) else str(uri)
        if uri in down:
            continue
        with suppress(BlockingIOError), _alone(spool.parent, wait=False):
            delivery = _Delivery(spool.parent, uri)
            if not _drain(delivery, attempts=1):
                down.add(uri)
            reports.append(delivery.report)
    return reports


def _unread(paths: Iterable[Path], offsets: dict[str, int]) -> bool:
    """Whether any of the spools holds a record behind its offset."""
    return any(next(read_lines(path, offsets.get(path.stem, 0)), None) is not None for path in paths)


class _Delivery:
    """The spools of one run and where they go."""

    def __init__(self, run_dir: Path, uri: str, only: str | None = None) -> None:
        self.run_dir, self.uri, self.spool, self.only = run_dir, uri, run_dir / "spool", only
        self.state = _State.load(run_dir, uri, only)
        if not self.state.path.exists():
            self.state.save()  # says at once where this run belongs, should the store be down
        self.report = DeliveryReport(run_dir.name)
        self.writer: RunWriter | None = None
        self.repeated: dict[str, set[Point]] = {}

    def deliver_available(self) -> int:
        """Deliver what the spools hold now.

        Returns:
            The number of records delivered.

        Raises:
            StoreUnavailable: the store went away; what was delivered until then is noted.
        """
        if not self._unread():
            self.report.complete = self.state.complete
            return 0
        writer = self._open()
        if writer is None:
            return 0  # the run's own first record is not written yet
        before, self.state.complete = self.report.records, False
        try:
            for name in self._spools():
                while chunk := self._read(name):
                    end, records = chunk
                    self.report.warnings += writer.write(name, self._without_repeats(name, records))
                    self.state.offsets[name] = end
                    self.state.save()
                    self.report.records += len(records)
            if self.ended() and not self._unread():
                writer.close_open_steps()
                self.state.complete = self.report.complete = True
                self.state.save()
        except Exception as error:
            if mlflow_store.is_outage(error):
                raise StoreUnavailable(mlflow_store.one_line(error)) from None
            raise
        return self.report.records - before

    def _unread(self) -> bool:
        paths = [self.spool / f"{name}.jsonl" for name in self._spools()]
        return _unread(paths, self.state.offsets)

    def _spools(self) -> list[str]:
        """Names of the spools, the run's own first."""
        names = (path.stem for path in self.spool.glob("*.jsonl"))
        if self.only is not None:
            names = (name for name in names if name.partition(CHILD_MARK)[0] == self.only)
        return sorted(names, key=lambda name: (name != RUN_SPOOL, name))

    def _read(self, name: str) -> tuple[int, list[tuple[int, dict[str, Any]]]] | None:
        """The next records of a spool with the offset after them, or None at its end."""
        records, end = [], 0
        for end, record in read_lines(self.spool / f"{name}.jsonl", self.state.offsets.get(name, 0)):
            records.append((end, record))
            if len(records) == _CHUNK:
                break
        return (end, records) if records else None

    def _without_repeats(self, name: str, records: list[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Drop points a resumed attempt reports again with the values they had (see `points_before`)."""
        path, first = self.spool / f"{name}.jsonl", records[0][0]
        if name not in self.repeated:  # this process may have been started in the middle of a later attempt
            starts = [end for end, record in read_lines(path) if record.get("type") == "start" and end < first]
            self.repeated[name] = points_before(path, starts[-1]) if len(starts) > 1 else set()
        kept = []
        for end, record in records:
            if record.get("type") == "start":
                self.repeated[name] = points_before(path, end)
            if record.get("type") == "metrics" and self.repeated[name]:
                step = record["step"]
                fresh = {n: v for n, v in record["values"].items() if (n, step, v) not in self.repeated[name]}
                record = {**record, "values": fresh}
            kept.append(record)
        return kept

    def ended(self) -> bool:
        """Whether the last thing the run said is that it ended (a resumed run starts again).

        Below a foreign MLflow run a process may have no spool of the run itself; its steps speak for it.
        """
        alone = self.only is None and (self.spool / f"{RUN_SPOOL}.jsonl").exists()
        # A part that was killed says no more; its step does.
        spools = [RUN_SPOOL] if alone else [name for name in self._spools() if CHILD_MARK not in name]
        return bool(spools) and all(self._last_boundary(name) == "end" for name in spools)

    def _last_boundary(self, name: str) -> str | None:
        kinds = [record.get("type") for _, record in read_lines(self.spool / f"{name}.jsonl")]
        return next((kind for kind in reversed(kinds) if kind in ("start", "end")), None)

    def _open(self) -> RunWriter | None:
        """The writer, made when the run's own first record is there (or MLFLOW_RUN_ID names a run to log into)."""
        if self.writer is not None:
            return self.writer
        lines = read_lines(self.spool / f"{RUN_SPOOL}.jsonl")
        start = next((record for _, record in lines if record.get("type") == "start"), None)
        outer = os.environ.get("MLFLOW_RUN_ID")
        if start is None and not outer:
            return None
        client = mlflow_store.connect(self.uri)
        embedded = self.uri == Home.current().tracking_uri and mlflow_store.sqlite_path(self.uri) is not None
        try:
            self.writer = RunWriter.open(
                client,
                run_dir=self.run_dir,
                start=start or {},
                artifact_root=Home.current().artifact_root if embedded else None,
                outer_run_id=outer,
            )
        except StoreUnavailable:
            raise
        except Exception as error:  # before the first record nothing can be skipped: later is the only answer
            raise StoreUnavailable(mlflow_store.one_line(error)) from None
        self.report.parent_run_id = self.writer.parent_run_id
        if self.writer.created:  # a new store, or somebody deleted the run: send all there is
            self.state.offsets.clear()
        self.writer.on_new_step = self._write_index
        self._write_index()
        return self.writer

    def _write_index(self) -> None:
        """`mlflow.json` tells the registry step and the command where the run is in MLflow."""
        assert self.writer is not None
        content = {
            "parent_run_id": self.writer.parent_run_id,
            "experiment_id": self.writer.experiment_id,
            "tracking_uri": safe_uri(self.uri),
            "steps": self.writer.step_run_ids,
        }
        _write_json(self.run_dir / _own("mlflow.json", self.only), content)


def _drain(delivery: _Delivery, attempts: int) -> bool:
    """Deliver all there is; give up, with a warning and False, after some attempts on a store that is down."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(_OUTAGE_SECONDS[attempt - 1])
        try:
            while delivery.deliver_available():
                pass
            return True
        except StoreUnavailable as error:
            reason = str(error)
    delivery.report.warnings.append(
        f"MLFLOW_TRACKING_URI: {safe_uri(delivery.uri)} cannot be used ({reason}); the run's records stay in "
        f"{delivery.spool} and are delivered with the next run"
    )
    return False


def _follow(delivery: _Delivery) -> None:
    """Deliver while the run is alive, through outages of the store, and drain the spools when it ends."""
    starter, stop = os.getppid(), []
    # Ctrl-C reaches the whole process group; the end of the run comes through its spool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    outages, wake = 0, 0.0
    while not stop and os.getppid() == starter and not delivery.ended():
        if time.monotonic() >= wake:
            try:
                delivery.deliver_available()
                outages = 0
            except StoreUnavailable as error:
                if not outages:
                    logger.warning("tracking waits: %s cannot be used (%s)", safe_uri(delivery.uri), error)
                wake = time.monotonic() + _OUTAGE_SECONDS[min(outages, len(_OUTAGE_SECONDS) - 1)]
                outages += 1
        time.sleep(_POLL_SECONDS)
    _drain(delivery, _ATTEMPTS)


@contextmanager
def _alone(run_dir: Path, *, wait: bool, only: str | None = None) -> Iterator[None]:
    """One delivery a run at a time; a second one waits for the first, or raises `BlockingIOError`."""
    with (run_dir / "spool" / _own(".delivery.lock", only)).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _own(name: str, only: str | None) -> str:
    """A file's name for the delivery of one step: `.delivery-pretrain.json`."""
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{only}{dot}{suffix}" if only else name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """Deliver one run; exit code 0 when MLflow holds everything, 1 when something is left for later, 2 on misuse."""
    parser = argparse.ArgumentParser(prog="python -m modelmill.components.core.delivery", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--follow", action="store_true", help="keep delivering until the run has ended")
    parser.add_argument("--only", metavar="STEP", help="deliver this step alone")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    if chosen.follow:
        os.nice(5)  # beside a training run that uses every core, tracking can wait
    try:
        report = deliver(chosen.run, follow=chosen.follow, only=chosen.only)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0 if report.complete else 1


if __name__ == "__main__":
    sys.exit(main())
