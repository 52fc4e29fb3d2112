"""The reaper ends what no live run owns, and nothing that it is not sure of."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.launchers import reaper
from modelmill.components.launchers.kubernetes_client import Cluster
from modelmill.components.launchers.trainjob_render import ADOPTED_ANNOTATION, MANAGED_BY, MANAGED_BY_LABEL, RUN_LABEL
from tests.fakes.kubernetes_api import KubernetesApi

NAMESPACE = "modelmill"
NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def api() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        yield server


def add(api: KubernetesApi, name: str, run: str = "", ours: bool = True, **annotations: str) -> None:
    labels = ({MANAGED_BY_LABEL: MANAGED_BY} if ours else {}) | ({RUN_LABEL: run} if run else {})
    meta = {"name": name, "namespace": NAMESPACE, "labels": labels, "annotations": annotations}
    kind = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob"}
    api.store.create({**kind, "metadata": meta, "spec": {"runtimeRef": {"name": "torch"}}})


def reap(api: KubernetesApi, states: dict[str, Any], **options: Any) -> tuple[list[str], dict[str, str]]:
    lines: list[str] = []

    def state_of(run: str) -> tuple[str, datetime | None]:
        if isinstance(states[run], Exception):
            raise states[run]
        return states[run]

    cluster = Cluster(NAMESPACE, api.client(), patience=5, pause=0.002)
    settings = {"grace": HOUR, "dry_run": False, "now": NOW + 2 * HOUR, "say": lines.append, **options}
    removed = reaper.reap(cluster, state_of, **settings)
    return removed, dict(line.split(": ", 1) for line in lines)


def test_each_job_gets_its_verdict(api):
    add(api, "lost", "r-failed")
    add(api, "live", "r-running")
    add(api, "ending", "r-canceling")
    add(api, "recent", "r-recent")
    add(api, "adopted", "r-failed", **{ADOPTED_ANNOTATION: (NOW + 1.5 * HOUR).isoformat()})
    add(api, "deleted-run", "r-gone")
    add(api, "unknown", "r-error")
    add(api, "by-hand")
    add(api, "foreign", "r-failed", ours=False)
    states = {
        "r-failed": ("FAILED", NOW),
        "r-running": ("RUNNING", None),
        "r-canceling": ("CANCELING", None),
        "r-recent": ("SUCCEEDED", NOW + 1.5 * HOUR),
        "r-gone": ("GONE", None),
        "r-error": OSError("503"),
    }
    would, lines = reap(api, states, dry_run=True)
    assert len(api.store.all("trainjobs")) == 9
    removed, lines = reap(api, states)
    assert would == removed == ["deleted-run", "lost"]
    assert "foreign" not in lines  # not even looked at
    assert lines["unknown"] == "kept: the state of run r-error is not known (503)"
    assert lines["by-hand"].startswith("kept: belongs to no run")
    assert lines["recent"] == "kept: run r-recent is SUCCEEDED, for 30 minutes only"
    assert {job["metadata"]["name"] for job in api.store.all("trainjobs")} == {
        "live", "ending", "recent", "adopted", "unknown", "by-hand", "foreign",
    }  # fmt: skip


def test_a_job_taken_over_in_that_moment_stays(api):
    add(api, "lost", "r-failed")
    key = ("trainer.kubeflow.org", "trainjobs", NAMESPACE, "lost")

    def take_over(method: str, _path: str) -> None:
        if method == "DELETE":
            api.store.edit(key, lambda job: job["metadata"]["labels"].update({RUN_LABEL: "r-next"}))

    api.before_request = take_over
    removed, lines = reap(api, {"r-failed": ("FAILED", NOW)})
    assert removed == []
    assert lines["lost"] == "kept: changed while it was looked at"
    assert len(api.store.all("trainjobs")) == 1


def test_only_what_pipelines_itself_says_counts(pipelines, tmp_path):
    address, answers, tokens = pipelines
    token = tmp_path / "token"
    token.write_text("first\n")
    api = reaper.PipelinesApi(address, token)
    ended = "2026-01-02T03:04:05Z"
    answers["a"] = 200, {"run_id": "a", "state": "FAILED", "finished_at": ended}
    answers["b"] = 200, {"run_id": "b", "state": "RUNNING", "finished_at": "1970-01-01T00:00:00Z"}
    answers["c"] = 404, {"code": 5, "message": "run not found"}
    assert api.state_of("a") == ("FAILED", datetime.fromisoformat(ended))
    token.write_text("second\n")
    assert api.state_of("b") == ("RUNNING", None)
    assert api.state_of("c") == ("GONE", None)
    assert tokens == ["Bearer first", "Bearer second", "Bearer second"]
    answers["d"] = 404, "<html>no such page</html>"  # a proxy's, not that of Kubeflow Pipelines
    answers["e"] = 200, "<html>log in</html>"
    answers["f"] = 500, {"code": 13}
    answers["g"] = 200, {"run_id": "other", "state": "FAILED"}
    for run in "defg":
        with pytest.raises((OSError, ValueError)):
            api.state_of(run)


def test_the_command(api, pipelines, tmp_path, monkeypatch, capsys):
    address, answers, _ = pipelines
    add(api, "lost", "a")
    answers["a"] = 404, {"code": 5}
    monkeypatch.delenv(reaper.ENDPOINT_VARIABLE, raising=False)
    assert reaper.main(["--namespace", NAMESPACE]) == 2
    assert "KF_PIPELINES_ENDPOINT: not set" in capsys.readouterr().err
    monkeypatch.setenv(reaper.ENDPOINT_VARIABLE, address)
    monkeypatch.setenv("KUBECONFIG", str(api.kubeconfig(Path(tmp_path / "config"))))
    import kubernetes.config.kube_config as kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    assert reaper.main(["--namespace", NAMESPACE, "--grace-minutes", "0", "--dry-run"]) == 0
    assert "lost: would delete: run a is GONE" in capsys.readouterr().out
    assert reaper.main(["--namespace", NAMESPACE, "--grace-minutes", "0"]) == 0
    assert api.store.all("trainjobs") == []
