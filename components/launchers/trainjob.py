"""Training on a cluster as a TrainJob of Kubeflow Trainer, launched, followed and collected by the step's pod.

The launcher may end at any moment (its pod is evicted, retried, or the run is resumed) and loses nothing by it: the
job goes on, and the next launcher of the same work finds it by its name. What is where:

    TrainJob      its name is the work's, so there is never a second one; an annotation says which attempt it is
    launch.json   in the work's scratch folder: the attempt that the folder's files are of
    result.json   written by rank 0 when all is done; the result is read from here, never from logs

A job is deleted when its end has been collected or explained, when a run is cancelled (`modelmill cancel`), or when
no live run owns it (`reaper.py`); never because its launcher ended.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.launchers import trainjob_explain as explain
from modelmill.components.launchers.kubernetes_client import (
    AlreadyExistsError,
    Cluster,
    ConflictError,
    ExpiredError,
)
from modelmill.components.launchers.trainjob_config import TrainJobConfig
from modelmill.components.launchers.trainjob_fit import check_fit
from modelmill.components.launchers.trainjob_log import NodeLog
from modelmill.components.launchers.trainjob_render import (
    ADOPTED_ANNOTATION,
    ATTEMPT_ANNOTATION,
    MANAGED_BY,
    MANAGED_BY_LABEL,
    RUN_LABEL,
    inside,
    launch_id,
    render,
    run_label,
    run_link,
)
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import (
    RankFailedError,
    RankFiles,
    TrainingJob,
    TrainingResult,
    TrainingStoppedError,
    read_json,
)

Json = dict[str, Any]
logger = logging.getLogger("modelmill")


class EvictedError(BaseException):
    """This process was told to end; no handler of ordinary errors may swallow it."""


class TrainJobLauncher:
    """See the module."""

    def __init__(
        self,
        config: TrainJobConfig,
        connect: Callable[[str], Cluster] = Cluster.connect,
        *,
        interval: float = 15.0,
        visibility: float = 120.0,
        ending: float = 1800.0,
    ) -> None:
        """
        Args:
            config: the cluster's part, from the profile.
            connect: gives the cluster of a namespace; called when something is launched.
            interval: seconds between two looks at what holds a job up, and the longest watch.
            visibility: seconds a finished job's result may take to show on the shared volume.
            ending: seconds a deleted job's pods may take to end.
        """
        self.config, self._connect = config, connect
        self._interval, self._visibility, self._ending = interval, visibility, ending

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(TrainJobConfig.model_validate(config))

    def check(self, training: TrainingConfig) -> None:
        """Refuse what the nodes of the profile cannot run; asks no cluster."""
        check_fit(training, self.config)

    def launch(self, job: TrainingJob) -> TrainingResult:
        self.check(job.training)
        if not inside(job.scratch, self.config.mount):
            raise UserError(
                f"MODELMILL_HOME: {job.scratch} is not on the volume that the training pods share"
                f" ({self.config.claim} at {self.config.mount}); set it to a folder there"
            )
        name = launch_id(job, self.config)
        try:
            with _evictable():
                return _Launch(self, job, self._connect(self.config.namespace), name).run()
        except EvictedError as error:
            raise TrainingStoppedError(
                f"the launcher was stopped by {error}; the training job {name} goes on without it, and a retry or"
                " `modelmill resume` finds it again"
            ) from None


class _Launch:
    """One launcher at work on one job."""

    def __init__(self, launcher: TrainJobLauncher, job: TrainingJob, cluster: Cluster, name: str) -> None:
        self.launcher, self.job, self.cluster, self.name = launcher, job, cluster, name
        self.config, self.files = launcher.config, RankFiles(job.scratch)
        self.record = job.scratch / "launch.json"
        self.world_size = job.training.parallel.world_size
        self.run_id = run_label(os.environ)
        self.troubles: dict[str, str] = {}  # by pod, in the order they were seen
        self.said = ""

    def run(self) -> TrainingResult:
        found = self._found() or self._start()
        if isinstance(found, TrainingResult):
            return found
        log = NodeLog(self.cluster, self.name, self.job.scratch / "node-log.json", print)
        log.start()
        patience = 0.2  # an exception leaves: a pod that is evicted has little time
        try:
            ended = self._follow(found)
            patience = 5.0
        finally:
            log.finish(patience)
        return self._end(ended)

    def _found(self) -> Json | TrainingResult | None:
        """The job or the result that an earlier launcher of this work left, if it is to be gone on with."""
        existing = self.cluster.job(self.name)
        ours = self._recorded()
        if existing is None:
            return self._result() if ours else None
        if existing["metadata"].get("labels", {}).get(MANAGED_BY_LABEL) != MANAGED_BY:
            raise UserError(
                f"launcher: the name {self.name} in {self.config.namespace} is taken by a TrainJob that is not ours;"
                " delete it, or choose another namespace"
            )
        same = ours is not None and existing["metadata"].get("annotations", {}).get(ATTEMPT_ANNOTATION) == ours
        if same and not existing["metadata"].get("deletionTimestamp"):
            self._say("found the training job of an earlier attempt, following it")
            return self._adopt(existing)
        # Its folder was cleared, or its task was another: whatever it still writes must not meet the next attempt.
        self._remove(existing)
        return self._result() if same else None

    def _recorded(self) -> str | None:
        """The attempt that the scratch folder's files are of; None when there is none at this very job."""
        record = read_json(self.record, {})
        try:
            unchanged = self.files.job.read_text() == self.job.text()
        except OSError:
            return None
        return record.get("attempt") if unchanged and isinstance(record, dict) else None

    def _start(self) -> Json | TrainingResult:
        """Begin a new attempt; the files of an earlier one are gone, and its pods too."""
        if self._waited_for_pods() and (found := self._found()) is not None:
            return found  # another launcher had begun, or the work was done before its pods ended
        attempt = uuid.uuid4().hex[:12]
        self.files.prepare(self.job)
        _replace(self.record, {"attempt": attempt, "job": self.name})
        self._point_to_run()
        body = render(self.job, self.config, attempt=attempt, launched=time.time(), environment=os.environ)
        try:
            made = self.cluster.create_job(body)
        except AlreadyExistsError:  # our own request, its answer lost; or another launcher's, a moment earlier
            found = self.cluster.job(self.name)
            if found is None or found["metadata"].get("deletionTimestamp"):
                raise RankFailedError(f"the training job {self.name} was deleted as it was made; try again") from None
            attempt = found["metadata"].get("annotations", {}).get(ATTEMPT_ANNOTATION, attempt)
            _replace(self.record, {"attempt": attempt, "job": self.name})
            return self._adopt(found)
        self._say(f"created the training job {self.name}")
        return made

    def _adopt(self, job: Json) -> Json:
        """Make this run the owner of a job, so that the end of an earlier run does not take it away."""
        self._point_to_run()
        while self.run_id and job["metadata"].get("labels", {}).get(RUN_LABEL) != self.run_id:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            meta = {"labels": {RUN_LABEL: self.run_id}, "annotations": {ADOPTED_ANNOTATION: now}}
            meta["resourceVersion"] = job["metadata"]["resourceVersion"]
            try:
                changed = self.cluster.patch_job(self.name, {"metadata": meta})
            except ConflictError:
                changed = self.cluster.job(self.name)
            if changed is None:
                return {**job, "_deleted": True}
            job = changed
        return job

    def _point_to_run(self) -> None:
        """Have the ranks report to this run."""
        folder = events.run_directory()
        if folder is not None:
            temporary = self.job.scratch / f".run.{os.getpid()}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(folder)
            os.replace(temporary, run_link(self.job.scratch))

    def _follow(self, job: Json) -> Json:
        """Wait for a job's end; returns it as it was last seen, `_deleted` if it is gone."""
        uid = job["metadata"]["uid"]
        while not _over(job):
            self._look(job)
            began = time.monotonic()
            try:
                for seen in self.cluster.watch_job(
                    self.name, job["metadata"]["resourceVersion"], self.launcher._interval
                ):
                    job = seen if seen["metadata"]["uid"] == uid else {**job, "_deleted": True}
                    if _over(job):
                        break
                else:
                    if time.monotonic() - began < self.launcher._interval / 2:  # a server that closes watches at once
                        self.cluster.sleep(self.launcher._interval / 2)
                    continue
            except ExpiredError:
                pass
            if not job.get("_deleted"):
                found = self.cluster.job(self.name)
                job = found if found and found["metadata"]["uid"] == uid else {**job, "_deleted": True}
        return job

    def _look(self, job: Json) -> None:
        """Say what holds a job up, remember what goes wrong, and end one that a user's mistake makes pointless."""
        if message := explain.mistake(self.files, self.world_size):
            self._remove(job, wait=False)
            raise UserError(message)
        if explain.condition(job, "Suspended"):
            workload = self.cluster.workload(job["metadata"]["uid"])
            position = None
            if workload and self.config.queue:
                position = self.cluster.queue_position(self.config.queue, workload["metadata"]["name"])
            return self._say(explain.queued(workload, self.config.queue, position))
        pods = self.cluster.pods(self.name)
        self.troubles |= {pod["metadata"]["uid"]: text for pod in pods if (text := explain.pod_trouble(pod))}
        held_up = [pod for pod in pods if pod.get("status", {}).get("phase", "Pending") == "Pending"]
        if pods and not held_up:
            return self._say("the nodes are running")
        nodes = self.job.training.parallel.nodes
        subjects = [pod["metadata"]["name"] for pod in held_up[:2]] or [f"{self.name}-node-0", self.name]
        found = [event for subject in subjects for event in self.cluster.events(subject)]
        return self._say(explain.waiting(held_up, found) or f"starting {nodes} node{'s' if nodes > 1 else ''}")

    def _end(self, job: Json) -> TrainingResult:
        """Collect what a finished job made, or say why it failed; the job is deleted either way."""
        if explain.condition(job, "Complete"):
            result = self._await_result()
            self._remove(job, wait=False)
            return result
        if finished := self._result():  # deleted, by its time to live or by hand, after it was done
            return finished
        if message := explain.mistake(self.files, self.world_size):
            self._remove(job, wait=False)
            raise UserError(message)
        if job.get("_deleted") or job["metadata"].get("deletionTimestamp"):
            raise TrainingStoppedError(
                f"the training job {self.name} was deleted, as `modelmill cancel` does; run it again to go on from its"
                " last checkpoint"
            )
        for pod in self.cluster.pods(self.name):
            if text := explain.pod_trouble(pod):
                self.troubles.setdefault(pod["metadata"]["uid"], text)
        reason = explain.failure(job, self.files, self.job.training.parallel, list(self.troubles.values()))
        # Left alone it may start again once its JobSet is gone (kubeflow/trainer#3737).
        self._remove(job, wait=False)
        raise RankFailedError(f"the training job {self.name} failed: {reason}")

    def _await_result(self) -> TrainingResult:
        """The result record; the node that wrote it and this one may not see the same files at once."""
        deadline = time.monotonic() + self.launcher._visibility
        while (result := self._result()) is None:
            if time.monotonic() > deadline:
                raise RankFailedError(
                    f"the training job {self.name} is complete, but {self.files.result} is not there after"
                    f" {self.launcher._visibility:.0f} s; is {self.config.claim} mounted at {self.config.mount} in all"
                    " pods?"
                )
            self.cluster.sleep(min(1.0, self.launcher._interval))
        return result

    def _result(self) -> TrainingResult | None:
        try:
            return TrainingResult.model_validate_json(self.files.result.read_bytes())
        except (OSError, ValidationError):
            return None

    def _remove(self, job: Json, *, wait: bool = True) -> None:
        try:
            self.cluster.delete_job(job)
        except ConflictError:
            return  # another one has its name by now, and is not ours to end
        if not wait:
            return
        deadline = time.monotonic() + self.launcher._ending
        while (found := self.cluster.job(self.name)) is not None:
            if found["metadata"]["uid"] != job["metadata"]["uid"]:
                return
            self._ending_too_long(deadline)
            self._say("waiting for an earlier attempt's pods to end")
            self.cluster.sleep(min(2.0, self.launcher._interval))

    def _waited_for_pods(self) -> bool:
        """Two attempts that write one folder would spoil it, whoever deleted the first one and however."""
        deadline, waited = time.monotonic() + self.launcher._ending, False
        while any(
            pod.get("status", {}).get("phase") not in ("Succeeded", "Failed") for pod in self.cluster.pods(self.name)
        ):
            waited = True
            self._ending_too_long(deadline)
            self._say("waiting for an earlier attempt's pods to end")
            self.cluster.sleep(min(2.0, self.launcher._interval))
        return waited

    def _ending_too_long(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise RankFailedError(
                f"pods of an earlier attempt at {self.name} have not ended in {self.launcher._ending / 60:.0f}"
                " minutes; if their node is lost, have its Node object deleted, and try again"
            )

    def _say(self, text: str) -> None:
        if text != self.said:
            self.said = text
            logger.info("%s", text)
            events.progress(text)


def _over(job: Json) -> bool:
    if job.get("_deleted") or job["metadata"].get("deletionTimestamp"):
        return True
    return explain.condition(job, "Complete") is not None or explain.condition(job, "Failed") is not None


def _replace(path: Path, content: Json) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


@contextmanager
def _evictable() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `EvictedError`, wherever the main thread is; the work's state outlives that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # once is enough, and what follows is quick
        raise EvictedError(signal.Signals(number).name)

    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGINT"):
        before[signal.Signals[name].value] = signal.signal(signal.Signals[name], leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
