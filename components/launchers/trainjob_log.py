"""The output of a TrainJob's first node, followed across restarts and lost connections, each line once."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelmill.components.launchers.kubernetes_client import Cluster
from modelmill.components.launchers.trainjob_explain import node_of
from modelmill.components.launchers.trainjob_render import TRAINER
from modelmill.components.training.launch import read_json

_PAUSE = 1.0  # seconds between two looks for a pod
_REMEMBERED_EVERY = 200  # lines
logger = logging.getLogger("modelmill")


class NodeLog:
    """A thread that passes on what the newest pod of node 0 writes.

    What was passed on last is kept in a file, so a retried launcher does not say everything again.
    """

    def __init__(self, cluster: Cluster, name: str, position: Path, write: Callable[[str], Any]) -> None:
        """
        Args:
            cluster: where the job runs.
            name: of the job.
            position: file that keeps pod and time of the last line.
            write: gets each line.
        """
        self._cluster, self._name, self._position, self._write = cluster, name, position, write
        self._stopped, self._ended = threading.Event(), threading.Event()
        kept = read_json(position, {})
        self._pod, self._last = str(kept.get("pod", "")), str(kept.get("last", ""))
        self._thread = threading.Thread(target=self._run, daemon=True, name="node-log")

    def start(self) -> None:
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """Pass on what is still there, for at most so long."""
        self._stopped.set()
        self._thread.join(seconds)
        self._remember()

    def _run(self) -> None:
        while True:
            last_round = self._stopped.is_set()  # what was written before the end is still passed on
            try:
                self._follow_newest()
            except Exception as error:  # whatever happens to the log, training and its watcher go on
                logger.debug("the log of %s broke off: %s", self._name, error)
            if last_round:
                return
            self._stopped.wait(_PAUSE)

    def _follow_newest(self) -> None:
        pods = [pod for pod in self._cluster.pods(self._name) if node_of(pod) == "0"]
        if not pods or pods[-1].get("status", {}).get("phase", "Pending") in ("Pending", "Unknown"):
            return
        uid = pods[-1]["metadata"]["uid"]
        if uid != self._pod:
            self._pod, self._last = uid, ""
        for number, line in enumerate(
            self._cluster.follow_log(pods[-1]["metadata"]["name"], TRAINER, self._seconds_since_last()), start=1
        ):
            stamp, _, text = line.partition(" ")
            if stamp <= self._last:  # stamps have nanoseconds, and one writer
                continue
            self._last = stamp
            self._write(text)
            if number % _REMEMBERED_EVERY == 0:
                self._remember()
        self._remember()

    def _seconds_since_last(self) -> int | None:
        """How far back to ask; generously, as the node's clock is another."""
        with suppress(ValueError):
            last = datetime.fromisoformat(self._last[:19]).replace(tzinfo=UTC)
            return max(1, math.ceil((datetime.now(UTC) - last).total_seconds()) + 120)
        return None

    def _remember(self) -> None:
        with suppress(OSError):
            self._position.write_text(json.dumps({"pod": self._pod, "last": self._last}))
