"""Runs on Kubeflow Pipelines, really executed: every step a process with the environment of its pod."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes.client import CoreV1Api

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import read_lines
from modelmill.components.core.pod import read_announcement
from modelmill.pipelines import catalog
from modelmill.pipelines.launch import cancel, cluster_logs, kubeflow_runs
from modelmill.pipelines.launch.runs import Run
from tests.pipelines.cluster import Cluster, cluster
from tests.pipelines.conftest import recipe, states, wait_for


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str) -> Iterator[Cluster]:
    with cluster(tmp_path, monkeypatch, shared_store, execute=True) as found:
        yield found


def spool(folder: Path, name: str) -> list[dict[str, object]]:
    return [record for _, record in read_lines(folder / "spool" / f"{name}.jsonl")]


def test_a_run_goes_through_pods_and_is_known_here_and_there(here: Cluster) -> None:
    result = here.run()
    assert (result.state, result.exit_code) == ("succeeded", 0), result.message
    assert set(states(result).values()) == {"finished"}
    assert result.view.steps["count_words"].metrics["loss"] == 4.75  # from the home, which is mounted here
    inside = here.home_of(result.run)
    assert "counting on standard output" in (inside / "logs" / "count_words.log").read_text()
    run = spool(inside, "_run")
    assert [record["type"] for record in run].count("start") == 1
    assert run[-1]["status"] == "FINISHED"
    assert sum(str(record.get("folder", "")).startswith("manifests/") for record in run) == 4
    kept = Run.open(result.run.folder)
    assert kept.state == "succeeded"
    assert kept.record.place["run_id"] in here.api.runs
    assert dict(result.links)["KFP"].endswith(kept.record.place["run_id"])


@pytest.mark.slow
def test_the_pods_are_what_the_profile_says(here: Cluster) -> None:
    here.api.secrets = {
        "mlflow": {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"},
        "hub": {"t": "x"},
    }
    result = here.run(
        tracking={"uri": here.tracking, "secret": "mlflow"}, secrets={"HF_TOKEN": "hub/t"}, environment={"OWN": "1"}
    )
    assert result.exit_code == 0, result.message
    run_id = result.run.record.place["run_id"]
    pods = here.api.executions[run_id].pods
    assert [pod.labels["modelmill.dev/step"] for pod in pods] == [*result.run.record.steps, "close-run"]
    for pod in pods:
        seen = pod.environment
        assert seen["MODELMILL_HOME"] == str(here.mount)
        assert seen["MODELMILL_RUN_ID"] == run_id
        assert seen["MODELMILL_IMAGE"] == pod.image
        assert (seen["HF_TOKEN"], seen["MLFLOW_TRACKING_PASSWORD"], seen["OWN"]) == ("x", "p", "1")
        assert "MODELMILL_LAUNCHER" not in seen
        assert read_announcement(seen["MODELMILL_ANNOUNCEMENT"])["recipe"]["pipeline"] == "sample"
    text = json.dumps(list(here.api.packages.values()))
    assert '"x"' not in text, "a secret's value is in the package"


@pytest.mark.slow
def test_mlflow_gets_one_parent_with_a_run_for_every_step(here: Cluster) -> None:
    from mlflow import MlflowClient

    here.api.images_without = ()
    result = here.run()
    client = MlflowClient(here.tracking)
    experiment = client.get_experiment_by_name("modelmill")
    found = client.search_runs(
        [experiment.experiment_id], f"tags.`modelmill.run_id` = '{result.run.record.place['run_id']}'"
    )
    parents = [each for each in found if "modelmill.step" not in each.data.tags]
    assert len(parents) == 1
    assert len(found) == 5
    assert {each.info.status for each in found} == {"FINISHED"}
    assert parents[0].data.params["words.text"] == "the quick brown fox"
    assert parents[0].data.tags["modelmill.profile"] == "test"
    assert [each.data.metrics["loss"] for each in found if "loss" in each.data.metrics] == [4.75]


@pytest.mark.slow
def test_a_second_run_reuses_and_repeats_only_side_effects(here: Cluster, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    first = here.run(recipe(announce__ledger=ledger))
    again = here.run(recipe(announce__ledger=ledger))
    assert states(again) | {"announce": ""} == dict.fromkeys(states(again), "reused") | {"announce": ""}
    assert states(again)["announce"] == "finished"
    assert ledger.read_text() == "19\n19\n"
    assert first.run.record.place["pipeline_version"] == again.run.record.place["pipeline_version"]
    assert len(here.api.versions) == 1, "the same content was uploaded twice"


def test_a_failed_step_is_named_and_a_resumed_run_repeats_no_side_effect(here: Cluster, tmp_path: Path) -> None:
    ledger, flag = tmp_path / "ledger", tmp_path / "flag"
    flag.touch()
    result = here.run(recipe(announce__ledger=ledger, archive__fail_while=flag))
    assert (result.state, result.exit_code) == ("failed", 1)
    assert f"archive: RuntimeError: {flag} exists" in result.message
    assert spool(here.home_of(result.run), "_run")[-1]["status"] == "FAILED"
    flag.unlink()
    resumed = here.follow(kubeflow_runs.resume(Run.open(result.run.folder)))
    assert resumed.exit_code == 0, resumed.message
    assert resumed.run.record.resumed_from == result.run.id
    assert states(resumed) == dict.fromkeys(("write_words", "count_words", "announce"), "reused") | {
        "archive": "finished"
    }
    assert ledger.read_text() == "19\n"
    with pytest.raises(UserError, match="nothing to resume"):
        kubeflow_runs.resume(resumed.run)


@pytest.mark.slow
def test_an_image_with_other_code_is_refused_with_the_fix(here: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelmill.components.core import step

    monkeypatch.setattr(step, "source_digest", lambda module: "0" * 16)
    result = here.run()
    assert result.state == "failed"
    assert "the image holds other code" in result.message
    assert "build the image anew" in result.message
    assert here.run(environment={"MODELMILL_ANY_CODE": "1"}).exit_code == 0


@pytest.mark.parametrize(
    ("least", "counted"),
    [pytest.param(1, "finished", marks=pytest.mark.slow), (100, "waiting")],
    ids=["taken", "skipped"],
)
def test_conditions_and_exit_handlers_keep_working(here: Cluster, least: int, counted: str) -> None:
    result = here.run(catalog.load("guarded", [f"many.at_least={least}"]))
    assert result.exit_code == 0, result.message
    assert states(result)["count_words"] == counted
    assert states(result)["report"] == "finished"
    assert "close-run" not in here.api.executions[result.run.record.place["run_id"]].tasks
    assert spool(here.home_of(result.run), "_run")[-1]["status"] == "FINISHED"


@pytest.mark.slow
def test_a_failed_attempt_is_tried_again_but_not_a_side_effect(here: Cluster, tmp_path: Path) -> None:
    result = here.run(recipe(count__behaviour="crash"), retries=2)
    pods = here.api.executions[result.run.record.place["run_id"]].pods
    assert [pod.labels["modelmill.dev/step"] for pod in pods].count("count_words") == 3
    dag = next(iter(here.api.packages.values()))["pipeline"]["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert "retryPolicy" in dag["archive"]
    assert "retryPolicy" not in dag["announce"]


def test_cancel_ends_the_run_and_its_training_jobs(here: Cluster, tmp_path: Path) -> None:
    job = {"image": "i", "service_account": "s", "cpu": "1", "memory": "1Gi", "runtime": "torch", "claim": "home"}
    profile = {"launcher": "trainjob", "trainjob": {**job, "namespace": "modelmill"}}
    run = here.submit(recipe(count__behaviour="sleep", count__scratch=tmp_path), **profile)
    run_id = run.record.place["run_id"]
    for name, owner in (("ours", run_id), ("theirs", "another")):
        here.kubernetes.store.create(training_job(name, owner))
    wait_for(lambda: (tmp_path / "pids").exists())
    told: list[str] = []
    assert cancel.cancel_on_kfp(run, told.append) == "cancelled"
    left = [each["metadata"]["name"] for each in here.kubernetes.store.all("trainjobs", "modelmill")]
    assert left == ["theirs"]
    assert "deleted training job ours" in told
    assert Run.open(run.folder).state == "cancelled"
    with pytest.raises(UserError, match="nothing to cancel"):
        cancel.cancel_on_kfp(Run.open(run.folder), told.append)


def training_job(name: str, run_id: str) -> dict[str, object]:
    labels = {"modelmill.dev/run": run_id, "app.kubernetes.io/managed-by": "modelmill"}
    metadata = {"name": name, "namespace": "modelmill", "labels": labels}
    spec = {"runtimeRef": {"name": "torch"}}
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def test_logs_come_from_pods_then_from_the_home(
    here: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = here.run()
    written: list[str] = []
    cluster_logs.show(result.run, "count_words", follow=False, write=written.append)
    assert "counting on standard output" in "".join(written)
    assert "==>" not in "".join(written)
    written.clear()
    cluster_logs.show(result.run, "", follow=True, write=written.append)
    text = "".join(written)
    assert all(text.count(f"==> {step} (") == 1 for step in (*result.run.record.steps, "close-run"))

    core = CoreV1Api(here.kubernetes.client())
    for pod in here.kubernetes.store.all("pods", "modelmill"):
        core.delete_namespaced_pod(pod["metadata"]["name"], "modelmill", grace_period_seconds=0)
    written.clear()
    cluster_logs.show(result.run, "count_words", follow=False, write=written.append)
    assert "counting on standard output" in "".join(written)
    (here.mount / "runs").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has no pod in namespace modelmill"):
        cluster_logs.show(result.run, "count_words", follow=False, write=written.append)
