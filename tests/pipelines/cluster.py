"""A cluster for tests: the fake APIs, a profile that leads there, and the command as a user starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kfp.dsl.pipeline_task import PipelineTask

from modelmill.components.core.home import Home
from modelmill.components.core.recipe import Recipe
from modelmill.pipelines.launch import kubeflow, kubeflow_runs
from modelmill.pipelines.launch.kubeflow import Endpoint
from modelmill.pipelines.launch.local import RunResult
from modelmill.pipelines.launch.platform_tasks import Placement
from modelmill.pipelines.launch.runs import Run
from modelmill.pipelines.platform import Profile
from tests.fakes.kfp_api import KfpApi
from tests.fakes.kubernetes_api import KubernetesApi
from tests.pipelines.conftest import recipe

POLL = 0.05
# kfp reads the whole call stack with its sources at every `set_...` of a task, to name the caller should the task
# be no container: below pytest, whose stack is deep, that is most of a test's time.
PipelineTask._ensure_container_spec_exists = lambda self: None


class Cluster:
    """What a test needs of a cluster; `mount` is the shared home of its pods."""

    def __init__(self, api: KfpApi, kubernetes: KubernetesApi, mount: Path, tracking: str) -> None:
        self.api, self.kubernetes, self.mount, self.tracking = api, kubernetes, mount, tracking

    def profile(self, **changes: object) -> Profile:
        values = {
            "name": "test",
            "where": "cluster",
            "images": {"registry": "registry.example/team"},
            "home": {"claim": "home", "mount": str(self.mount)},
            "kfp": {"endpoint": self.api.url},
            "tracking": {"uri": self.tracking},
            "retries": 0,
        }
        return Profile.model_validate(values | changes)

    def endpoint(self, **changes: object) -> Endpoint:
        return Endpoint(self.profile(**changes))

    def submit(self, loaded: Recipe | None = None, **changes: object) -> Run:
        placement = Placement(loaded or recipe(), self.profile(**changes), "words")
        return kubeflow_runs.submit(placement)

    def follow(self, run: Run) -> RunResult:
        return kubeflow_runs.follow(run, self.endpoint(), poll=POLL)

    def run(self, loaded: Recipe | None = None, **changes: object) -> RunResult:
        """Submit and follow to the end."""
        return self.follow(self.submit(loaded, **changes))

    def home_of(self, run: Run) -> Path:
        """The run's folder in the shared home."""
        return self.mount / "runs" / run.record.place["run_id"]

    @property
    def cluster_home(self) -> Home:
        return Home(self.mount)


@contextmanager
def cluster(folder: Path, patch: pytest.MonkeyPatch, tracking: str, *, execute: bool = False) -> Iterator[Cluster]:
    """A cluster that knows one namespace, with quick retries."""
    patch.setattr(kubeflow, "_PAUSES", (0.01, 0.02, 0.03, 0.04))
    with KubernetesApi() as kubernetes, KfpApi(folder / "kfp", kubernetes=kubernetes) as api:
        api.execute = execute
        api.images_without = ("mlflow",)  # importing it costs every pod seconds
        patch.setenv("KUBECONFIG", str(kubernetes.kubeconfig(folder / "kubeconfig")))
        (folder / "mount").mkdir()
        yield Cluster(api, kubernetes, folder / "mount", tracking)
