"""Whenever the launcher dies and whatever the API server does: one job at a time, none lost, none left over.

A launcher is one process that asks the API server one thing after another. It is ended before and after each of its
requests in turn, as SIGKILL ends it, and somebody comes after it: a retry, a resumed run, or the reaper after a
cancellation. Then the same with faults of the server at each request, and with random sequences of all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes.client import ApiClient

from modelmill.components.core.errors import UserError
from modelmill.components.launchers.kubernetes_client import Cluster
from modelmill.components.launchers.reaper import delete_jobs_of, reap
from modelmill.components.training.launch import RankFailedError, TrainingResult, TrainingStoppedError
from tests.components.launchers.trainjobs import NAMESPACE, finish_work, job, launcher
from tests.fakes.kubernetes_api import KubernetesApi
from tests.fakes.kubernetes_trainer import RUNTIME, Trainer

REQUESTS = 12  # about what an undisturbed launch makes
DAY = timedelta(days=1)


class KilledError(BaseException):
    """The process is gone; nothing handles this."""


class Mortal(ApiClient):
    """A client whose process dies at its n-th request, before it is sent or after it was carried out."""

    def __init__(self, api: KubernetesApi, dies_at: int, after: bool) -> None:
        super().__init__(api.client().configuration)
        self.left, self.after = dies_at, after

    def call_api(self, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():  # the log's thread dies with the process
            return super().call_api(*arguments, **options)
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KilledError
        try:
            return super().call_api(*arguments, **options)
        finally:
            if self.left == 0:
                raise KilledError


class Counted(ApiClient):
    """A client that counts its requests."""

    def __init__(self, api: KubernetesApi) -> None:
        super().__init__(api.client().configuration)
        self.requests = 0

    def call_api(self, *arguments: Any, **options: Any) -> Any:
        self.requests += 1
        return super().call_api(*arguments, **options)


class World:
    """A cluster that goes on by itself, one deed a request of the launcher, and watches over what must hold."""

    def __init__(self, folder: Path, *, work: str = "succeeds", pace: int = 3) -> None:
        self.home, self.pace = folder, pace
        self.api = KubernetesApi()
        self.api.longest_watch = 0.005
        self.api.store.create(RUNTIME)
        self.api.store.checks = False  # what is written is the same every time, and checked by the other tests
        self.trainer, self.job = Trainer(self.api), job(folder, parallel={"nodes": 1, "processes_per_node": 2})
        self.deeds: dict[str, int] = {}  # by uid of the job
        self.attempts: list[str] = []
        self.broken: list[str] = []
        self.failures = 1 if work == "fails once" else 0
        self.goes_on: Callable[[], bool] = lambda: True
        self.api.store.on_change.append(self._check)
        self.api.before_request = self._go_on

    def __enter__(self) -> World:
        self.api.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.api.__exit__()

    def _check(self, change: Any) -> None:
        """Never two live attempts: no pods of two jobs, and no second job beside the pods of a first."""
        if change.key[1] == "trainjobs" and change.type == "ADDED":
            self.attempts.append(change.item["metadata"]["uid"])
            alive = [key[3] for key, item in self.api.store.objects.items() if key[1] == "pods" and _alive(item)]
            self.broken += [f"{name} was alive when the next attempt began" for name in alive]

    def _go_on(self, _method: str, _path: str) -> None:
        with self.api.store.lock:
            for name in self.trainer.names() if self.goes_on() else []:
                uid = self.api.store.get("trainjobs", name)["metadata"]["uid"]
                step = self.deeds[uid] = self.deeds.get(uid, 0) + 1
                if step == 1:
                    self.trainer.admit(name)
                elif step == self.pace:
                    self.trainer.run(name)
                elif step == 2 * self.pace and self.failures:
                    self.failures -= 1
                    self.trainer.fail(name)
                elif step == 2 * self.pace:
                    finish_work(self.api, name)
                    self.trainer.complete(name)

    def launch(self, client: Any = None) -> TrainingResult:
        return launcher(self.api, self.home, client).launch(self.job)

    def die(self, dies_at: int, after: bool) -> TrainingResult | None:
        """Launch and be killed at a request; the result if the launch was through before."""
        try:
            return self.launch(Mortal(self.api, dies_at, after))
        except (KilledError, RankFailedError):
            return None

    def finish(self) -> TrainingResult:
        """Try again, as Kubeflow Pipelines does, until it is done."""
        for _ in range(3):
            try:
                return self.launch()
            except (RankFailedError, TrainingStoppedError):
                continue
        return self.launch()

    def cluster(self) -> Cluster:
        return Cluster(NAMESPACE, self.api.client(), patience=10, pause=0.002)

    def reap(self, state: str = "CANCELED") -> None:
        """Two days later, as often as a CronJob comes: it leaves alone what changes while it looks."""
        now = datetime.now(UTC)
        over = None if state == "RUNNING" else now
        for _ in range(8):
            later = now + 2 * DAY
            reap(self.cluster(), lambda _: (state, over), grace=DAY, dry_run=False, now=later, say=lambda _: None)

    def check(self, result: TrainingResult, attempts: int) -> None:
        """The result is that of the last attempt, whose export is there, and nothing is left over."""
        assert self.broken == []
        assert self.api.store.rejected == []
        assert len(self.attempts) == attempts
        assert (self.job.exports[0] / "weights").read_text() == result.metadata["made_by"]
        assert self.api.store.all("trainjobs") == self.api.store.all("pods") == []


def _alive(pod: dict[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") not in ("Succeeded", "Failed")


@pytest.fixture(autouse=True)
def _run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MODELMILL_RUN_ID", "run-1")
    return


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_killed_launcher_loses_nothing(tmp_path, after):
    result = None
    for dies_at in range(1, 4 * REQUESTS):
        with World(tmp_path / str(dies_at)) as world:
            result = world.die(dies_at, after)
            world.check(world.finish() if result is None else result, attempts=1)
        if result is not None:  # the launch was through before: every request was met
            break
    assert result is not None
    assert dies_at > REQUESTS / 2


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_cancelled_run_leaves_nothing_wherever_its_launcher_was(tmp_path, after):
    for dies_at in range(1, REQUESTS):
        with World(tmp_path / str(dies_at)) as world:
            world.die(dies_at, after)
            if dies_at % 2:
                delete_jobs_of(world.cluster(), "run-1")  # `modelmill cancel`; else in KFP's user interface
            world.reap()
            assert world.api.store.all("trainjobs") == world.api.store.all("pods") == []
            assert world.broken == []


def test_the_reaper_leaves_a_live_run_alone(tmp_path):
    with World(tmp_path) as world:
        world.die(6, True)
        world.reap("RUNNING")
        world.check(world.finish(), attempts=1)


@pytest.mark.parametrize("fault", [429, 500, "drop", "lost"])
def test_faults_of_the_server_at_each_request(tmp_path, fault):
    for skip in range(REQUESTS):
        with World(tmp_path / f"{fault}-{skip}") as world:
            world.api.fail(fault, skip=skip, times=2)
            world.check(world.launch(), attempts=1)


def test_a_server_that_is_down_for_long_is_waited_for(tmp_path):
    with World(tmp_path) as world:
        world.api.fail(503, skip=6, times=25)
        world.check(world.launch(), attempts=1)


def test_two_launchers_at_once_share_one_job(tmp_path):
    """What the lock of the step's output prevents, were it lost."""
    with World(tmp_path) as world:
        clients = [Counted(world.api) for _ in range(2)]
        # A launcher that is late finds no job and makes one: the job must not end before both follow it.
        world.goes_on = lambda: min(client.requests for client in clients) >= REQUESTS
        results: list[TrainingResult] = []
        threads = [threading.Thread(target=lambda c=c: results.append(world.launch(c))) for c in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(results) == 2
        assert results[0] == results[1]
        world.check(results[0], attempts=1)


ACTIONS = st.one_of(
    st.tuples(st.just("die"), st.integers(1, REQUESTS), st.booleans()),
    st.tuples(st.just("fault"), st.sampled_from([429, 500, "drop", "lost"]), st.integers(0, REQUESTS)),
    st.tuples(st.just("resume"), st.integers(2, 4), st.none()),
    st.tuples(st.just("cancel"), st.none(), st.none()),
    st.tuples(st.just("reap"), st.sampled_from(["RUNNING", "FAILED"]), st.none()),
    st.tuples(st.just("expire"), st.none(), st.none()),
)
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def _sequence(folder: Path, actions: list[tuple[Any, Any, Any]], work: str) -> None:
    with pytest.MonkeyPatch.context() as patch, World(folder, work=work) as world:
        result = None
        for what, value, extra in actions:
            if what == "die":
                result = world.die(value, extra) or result
            elif what == "fault":
                world.api.fail(value, skip=extra)
            elif what == "resume":
                patch.setenv("MODELMILL_RUN_ID", f"run-{value}")
            elif what == "cancel":
                delete_jobs_of(world.cluster(), "run-1")
            elif what == "reap":
                world.reap(value)
            elif what == "expire":
                world.api.store.expire()
        world.api.heal()
        result = world.finish()
        world.check(result, attempts=len(world.attempts))
        assert result.metadata["made_by"]
        world.reap("SUCCEEDED")
        assert world.api.store.all("trainjobs") == []


@FEW
@given(actions=st.lists(ACTIONS, min_size=1, max_size=4), work=st.sampled_from(["succeeds", "fails once"]))
def test_any_sequence(tmp_path_factory, actions, work):
    _sequence(tmp_path_factory.mktemp("world"), actions, work)


@pytest.mark.slow
@settings(FEW, max_examples=60)
@given(actions=st.lists(ACTIONS, min_size=1, max_size=8), work=st.sampled_from(["succeeds", "fails once"]))
def test_any_long_sequence(tmp_path_factory, actions, work):
    _sequence(tmp_path_factory.mktemp("world"), actions, work)


def test_a_server_that_stays_away_is_named(tmp_path):
    from modelmill.components.launchers.kubernetes_client import ClusterUnreachableError

    with World(tmp_path) as world:
        world.api.fail("drop", times=1000)
        cluster = Cluster(NAMESPACE, world.api.client(), patience=0.1, pause=0.01)
        with pytest.raises(ClusterUnreachableError, match="training goes on"):
            cluster.job("any")
        world.api.heal()
        world.api.fail(422)
        with pytest.raises(UserError, match="does not take the job"):
            cluster.create_job({})
