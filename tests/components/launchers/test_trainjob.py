"""The TrainJob launcher against an API server that keeps state: the ways of a job, and what users are told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core import events
from modelmill.components.core.errors import UserError
from modelmill.components.launchers.reaper import delete_jobs_of
from modelmill.components.launchers.trainjob_render import ATTEMPT_ANNOTATION, RUN_LABEL, launch_id
from modelmill.components.training.launch import RankFailedError, TrainingJob, TrainingStoppedError
from tests.components.launchers.trainjobs import NAMESPACE, Script, finish_work, job, launcher, place
from tests.fakes.kubernetes_api import KubernetesApi
from tests.fakes.kubernetes_trainer import RUNTIME, Trainer


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    monkeypatch.setenv("MODELMILL_RUN_ID", "run-1")
    with KubernetesApi() as server:
        server.store.create(RUNTIME)
        yield server
        assert server.store.rejected == []


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def created(api: KubernetesApi) -> int:
    return sum(1 for method, path in api.requests if method == "POST" and path.endswith("/trainjobs"))


def ways(api: KubernetesApi) -> Trainer:
    return Trainer(api)


def test_a_job_waits_runs_ends_and_is_deleted(api, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    trainer = ways(api)

    def queue(name: str) -> None:
        trainer.suspend(name)
        trainer.workload(
            name, "couldn't assign flavors to pod set node: insufficient quota for nvidia.com/gpu, 8 more"
        )
        api.pending["training"] = [{"metadata": {"name": f"trainjob-{name}"}, "positionInLocalQueue": 2}]

    def unschedulable(name: str) -> None:
        trainer.unschedulable(name, "0/3 nodes are available: 3 Insufficient vpc.amazonaws.com/efa.")

    Script(
        api,
        queue,
        lambda name: None,
        lambda name: trainer.admit(name, place=False),
        unschedulable,
        lambda name: None,
        trainer.run,
        lambda name: None,
        lambda name: (finish_work(api, name), trainer.complete(name)),
    )
    result = launcher(api, tmp_path).launch(job(tmp_path))
    assert result.metrics == {"loss": 1.5}
    assert api.store.all("trainjobs") == api.store.all("pods") == []
    heard = said(caplog)
    assert "waiting in the queue training, place 3: no free nvidia.com/gpu in the quota" in heard
    assert any(line.startswith("no node has enough free vpc.amazonaws.com/efa") for line in heard)
    assert "the nodes are running" in heard
    assert capsys.readouterr().out.split("\n")[:2] == ["step 1", "step 2"]


@pytest.mark.parametrize("found", ["running", "complete", "failed", "gone"])
def test_a_successor_goes_on_where_its_predecessor_was_evicted(api, tmp_path, found):
    trainer, work = ways(api), job(tmp_path)
    Script(api, trainer.admit, trainer.run, lambda name: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStoppedError, match="goes on without it"):
        launcher(api, tmp_path).launch(work)
    (left,) = api.store.all("trainjobs")  # nobody deleted it
    name, attempt = left["metadata"]["name"], left["metadata"]["annotations"][ATTEMPT_ANNOTATION]
    api.before_request = None
    if found == "running":
        Script(api, lambda name: finish_work(api, name), trainer.complete)
    elif found == "failed":
        trainer.fail(name)
    else:
        finish_work(api, name)
        trainer.complete(name)
    if found == "gone":
        api.store.delete(("trainer.kubeflow.org", "trainjobs", NAMESPACE, name))
    if found == "failed":
        with pytest.raises(RankFailedError, match="max restarts"):
            launcher(api, tmp_path).launch(work)
        Script(api, trainer.admit, lambda name: finish_work(api, name), trainer.complete)
        result = launcher(api, tmp_path).launch(work)  # only who asks again gets another attempt
        assert result.metadata["made_by"] != attempt
        assert created(api) == 2
    else:
        result = launcher(api, tmp_path).launch(work)
        assert result.metadata["made_by"] == attempt
        assert created(api) == 1
    assert (work.exports[0] / "weights").read_text() == result.metadata["made_by"]
    assert api.store.all("trainjobs") == []


def test_a_resumed_run_takes_the_job_over(api, tmp_path, monkeypatch):
    trainer, work = ways(api), job(tmp_path)
    Script(api, trainer.admit, lambda name: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStoppedError):
        launcher(api, tmp_path).launch(work)
    for run in ("run-1", "run-2"):
        (tmp_path / "runs" / run / "spool").mkdir(parents=True)
    monkeypatch.setenv("MODELMILL_RUN_ID", "run-2")
    monkeypatch.setenv("MODELMILL_RUN_DIR", str(tmp_path / "runs/run-2"))
    owners = []

    def look(name: str) -> None:
        events.append_line(work.scratch / "run/events.jsonl", {"event": "progress"})  # as a rank does
        owners.append(api.store.get("trainjobs", name)["metadata"]["labels"][RUN_LABEL])

    Script(api, look, trainer.run, lambda name: finish_work(api, name), trainer.complete)
    launcher(api, tmp_path).launch(work)
    assert owners == ["run-2"]
    assert (tmp_path / "runs/run-2/events.jsonl").exists()
    assert created(api) == 1


@pytest.mark.parametrize("change", ["cleared folder", "other task"])
def test_a_job_of_other_work_is_ended_before_the_next_begins(api, tmp_path, change):
    trainer, work = ways(api), job(tmp_path)
    Script(api, trainer.admit, trainer.run, lambda name: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStoppedError):
        launcher(api, tmp_path).launch(work)
    api.store.kubelet = True  # pods end when their processes do
    old = {pod["metadata"]["name"] for pod in api.store.all("pods")}
    if change == "cleared folder":
        shutil.rmtree(work.scratch)
        work = job(tmp_path)
    else:
        work = TrainingJob(work.module, {**work.spec, "until": 2}, work.training, work.scratch, work.exports)
    threading.Timer(0.3, lambda: [api.store.remove(("", "pods", NAMESPACE, name)) for name in old]).start()
    overlap = []
    api.store.on_change.append(
        lambda change: overlap.extend(
            key
            for key in api.store.objects
            if change.key[1] == "trainjobs" and change.type == "ADDED" and key[3] in old
        )
    )
    Script(api, trainer.admit, lambda name: finish_work(api, name), trainer.complete)
    launcher(api, tmp_path).launch(work)
    assert created(api) == 2
    assert overlap == []  # no pod of the first was left when the second was made


def test_pods_that_do_not_end_hold_up_the_next_attempt(api, tmp_path):
    trainer, work = ways(api), job(tmp_path)
    Script(api, trainer.admit, trainer.run, lambda name: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingStoppedError):
        launcher(api, tmp_path).launch(work)
    api.store.kubelet = True
    shutil.rmtree(work.scratch)
    with pytest.raises(RankFailedError, match="have not ended"):
        launcher(api, tmp_path, ending=0.1).launch(job(tmp_path))
    assert created(api) == 1


def failed_message(api: KubernetesApi, home: Path, *deeds: Any) -> str:
    trainer = ways(api)
    Script(api, trainer.admit, trainer.run, *deeds)
    with pytest.raises(RankFailedError) as caught:
        launcher(api, home).launch(job(home))
    assert api.store.all("trainjobs") == []
    return str(caught.value)


def test_failures_are_explained(api, tmp_path):
    trainer = ways(api)
    nothing = lambda name: None  # noqa: E731
    told = failed_message(api, tmp_path / "a", lambda name: trainer.out_of_memory(name, 1), nothing, trainer.fail)
    assert "node 1 on worker-1 ran out of memory" in told
    told = failed_message(api, tmp_path / "b", lambda name: trainer.lose_node(name, 0), nothing, trainer.fail)
    assert "node 0 on worker-0 was lost: Taint manager" in told
    late = lambda name: trainer.fail(name, "DeadlineExceeded", "deadline exceeded")  # noqa: E731
    assert "trainjob.deadline_seconds" in failed_message(api, tmp_path / "c", late)

    def crash(name: str) -> None:
        scratch = job(tmp_path / "d").scratch
        for number, (rank, message) in enumerate([(0, "OSError: before the restart"), (1, "ValueError: no")]):
            record = {"rank": rank, "kind": "crash", "message": message, "time": float(number)}
            (scratch / f"failure-{rank}.json").write_text(json.dumps(record))
            os.utime(scratch / f"failure-{rank}.json", (2000.0 * number, 2000.0 * number))
            for node in range(2):
                log = scratch / f"ranks/node-{node}/start-{number}/attempt_0/0/stderr.log"
                log.parent.mkdir(parents=True)
                log.write_text(f"Traceback\n{message}\n")
                os.utime(log, (1000.0 * number, 1000.0 * number))
                os.utime(log.parents[2], (1000.0 * number, 1000.0 * number))

    told = failed_message(api, tmp_path / "d", crash, trainer.fail)
    assert "rank 1 of 2 failed: ValueError: no; the end of its log:\n  Traceback" in told


def test_what_holds_a_job_up_is_said(api, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = ways(api)
    claim = 'pod has unbound immediate PersistentVolumeClaims: persistentvolumeclaim "modelmill-home" not found'
    quota = 'Error creating: pods "x" is forbidden: exceeded quota: team, requested: requests.cpu=2'
    Script(
        api,
        lambda name: trainer.event(f"{name}-node-0", "FailedCreate", quota, "Job"),
        lambda name: None,
        lambda name: trainer.admit(name, place=False),
        lambda name: trainer.unschedulable(name, claim),
        lambda name: None,
        trainer.pull_error,
        lambda name: None,
        trainer.run,
        lambda name: (finish_work(api, name), trainer.complete(name)),
    )
    launcher(api, tmp_path).launch(job(tmp_path))
    heard = "\n".join(said(caplog))
    assert "the namespace's quota is used up" in heard
    assert "the shared volume is not bound" in heard
    assert "the image registry.example/modelmill-cpu@sha256:" in heard
    assert "cannot be pulled" in heard


def test_a_users_mistake_ends_the_job_without_further_attempts(api, tmp_path):
    trainer, work = ways(api), job(tmp_path)

    def mistake(name: str) -> None:
        record = {"rank": 0, "kind": "user", "message": "training.learning_rate: too high", "time": 1.0}
        (work.scratch / "failure-0.json").write_text(json.dumps(record))

    Script(api, trainer.admit, trainer.run, mistake)
    with pytest.raises(UserError, match="too high"):
        launcher(api, tmp_path).launch(work)
    assert api.store.all("trainjobs") == []


def test_a_restart_is_followed_and_each_line_said_once(api, tmp_path, capsys):
    trainer = ways(api)
    logs = iter([("step 1", "step 2"), ("step 2 again", "step 3")])

    def run(name: str) -> None:
        trainer.log_lines = next(logs)
        trainer.run(name)

    def followed(times: int) -> Any:
        def wait(name: str) -> None:
            """Until the newest pod's log was asked for so often."""
            pod, deadline = trainer.pods(name)[0]["metadata"]["name"], time.monotonic() + 30
            while sum(f"/pods/{pod}/log" in path for _, path in api.requests) < times:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.2)  # the answer is on its way

        return wait

    Script(
        api,
        trainer.admit,
        run,
        followed(1),
        lambda name: api.drop_watches(),  # the followed log breaks off
        followed(2),
        trainer.restart,
        run,
        followed(1),
        lambda name: (finish_work(api, name), trainer.complete(name)),
    )
    launcher(api, tmp_path).launch(job(tmp_path))
    assert capsys.readouterr().out.split("\n")[:4] == ["step 1", "step 2", "step 2 again", "step 3"]


def test_a_cancelled_run_leaves_nothing(api, tmp_path):
    trainer, started = ways(api), launcher(api, tmp_path)
    cluster = started._connect(NAMESPACE)
    Script(api, trainer.admit, trainer.run, lambda name: delete_jobs_of(cluster, "run-1"))
    with pytest.raises(TrainingStoppedError, match="was deleted, as `modelmill cancel` does"):
        started.launch(job(tmp_path))
    assert api.store.all("trainjobs") == api.store.all("pods") == []
    assert delete_jobs_of(cluster, "run-1") == []


def test_an_expired_version_and_dropped_watches_lose_nothing(api, tmp_path):
    trainer = ways(api)

    def expire(name: str) -> None:
        trainer.run(name)
        api.store.expire()

    Script(
        api, trainer.admit, expire, lambda name: (finish_work(api, name), trainer.complete(name), api.store.expire())
    )
    api.fail("drop", path="watch=True", times=2, skip=1)
    api.fail(500, path="watch=True", times=2, skip=1)
    assert launcher(api, tmp_path).launch(job(tmp_path)).metrics == {"loss": 1.5}


def test_a_result_that_shows_late_is_waited_for_and_a_missing_one_is_said(api, tmp_path):
    trainer = ways(api)

    def late(name: str) -> None:
        threading.Timer(0.2, finish_work, (api, name)).start()
        trainer.complete(name)

    work = job(tmp_path)
    Script(api, trainer.admit, trainer.complete)
    with pytest.raises(RankFailedError, match=r"result\.json is not there"):
        launcher(api, tmp_path, visibility=0.1).launch(work)
    assert len(api.store.all("trainjobs")) == 1  # it may still show; nothing that is done is thrown away
    finish_work(api, launch_id(work, place(tmp_path)))
    assert launcher(api, tmp_path).launch(work).metrics == {"loss": 1.5}
    assert created(api) == 1
    Script(api, trainer.admit, late)
    assert launcher(api, tmp_path, visibility=30.0).launch(job(tmp_path, key="f" * 24)).metrics == {"loss": 1.5}


def test_a_name_that_is_taken_and_a_folder_that_is_not_shared_are_refused(api, tmp_path):
    work = job(tmp_path)
    meta = {"name": launch_id(work, place(tmp_path)), "namespace": NAMESPACE}
    kind = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob"}
    api.store.create({**kind, "metadata": meta, "spec": {"runtimeRef": {"name": "torch"}}})
    with pytest.raises(UserError, match="is taken by a TrainJob that is not ours"):
        launcher(api, tmp_path).launch(work)
    with pytest.raises(UserError, match="not on the volume"):
        launcher(api, tmp_path, place_changes={"mount": "/elsewhere"}).launch(work)
    api.allowed = lambda verb, _resource, _namespace: verb != "create"
    with pytest.raises(UserError, match="the cluster refuses"):
        launcher(api, tmp_path).launch(job(tmp_path, key="f" * 24))
    api.allowed = lambda *_: True
    api.missing.add("trainer.kubeflow.org")
    with pytest.raises(UserError, match="the cluster has no TrainJobs"):
        launcher(api, tmp_path).launch(job(tmp_path, key="f" * 24))
