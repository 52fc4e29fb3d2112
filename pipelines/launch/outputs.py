"""What a run made, wherever it ran: its outputs and its reports, brought to this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import suggest
from modelmill.pipelines.launch.runs import Run, find_run
from modelmill.pipelines.launch.watch import RunView

REPORT = "report.html"


def fetch_run(reference: str, step: str | None, output: Path) -> dict[str, Any]:
    """Copy the output of a step of a run into a folder, every file verified.

    Args:
        reference: names the run, see `find_run`.
        step: whose output; None takes the last step that made a model.
        output: new or empty folder.

    Raises:
        UserError: the run has no such output, its files are not within reach, or the folder holds something.
    """
    run = find_run(Home.current(), reference)
    manifests = manifests_of(run)
    if step is None:
        step = next((name for name, each in reversed(manifests.items()) if each.kind == "model"), None)
        if step is None:
            made = ", ".join(manifests) or "nothing yet"
            raise UserError(f"run: {run.id} made no model; name the output with --step (it has {made})")
    if step not in manifests:
        raise UserError(
            f"--step: {run.id} has no output of {step!r}; {suggest(step, list(manifests) or run.record.steps)}"
        )
    manifest = manifests[step]
    with _filled(output) as folder:
        for entry in manifest.files:
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(manifest.path(entry.path), target)
            except UserError as error:
                raise UserError(f"{error}; {_elsewhere(run)}" if run.record.place else str(error)) from None
    return {"source": f"{run.id} {step}", "uri": manifest.uri, "files": len(manifest.files), "folder": str(output)}


def _elsewhere(run: Run) -> str:
    return (
        "the run was on a cluster: fetch where its home is mounted, let the profile keep outputs in S3 (store), or"
        " fetch the registered model with models:/"
    )


@contextmanager
def _filled(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` when that is done: whole or not at all."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} is not an empty folder; give a new one")
    folder = output.absolute().with_name(f".{output.absolute().name}.partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, output.absolute())
    except OSError as error:
        raise UserError(f"--output: {output} cannot be filled ({error}); free space, or give another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def manifests_of(run: Run) -> dict[str, Manifest]:
    """Manifests of a run's steps that have finished, in the order of the pipeline."""
    view = _view(run)
    found: dict[str, Manifest] = {}
    for step in view.steps.values():
        manifest = _manifest(step.uri) if step.uri else None
        if manifest is not None:
            found[step.name] = manifest
    missing = [step.name for step in view.steps.values() if step.settled and step.name not in found]
    return found if not missing or not run.record.place else {**found, **_tracked_manifests(run, missing)}


def _manifest(uri: str) -> Manifest | None:
    """The manifest of an output that this machine, or a home mounted here, has noted."""
    from modelmill.components.core.store import noted_folder

    with suppress(UserError):
        return Manifest.read(noted_folder(uri) / "manifest.json")
    return None


def _view(run: Run) -> RunView:
    if run.record.place and run.state == "running":
        from modelmill.pipelines.launch.kubeflow import Endpoint
        from modelmill.pipelines.launch.kubeflow_runs import profile_of, refresh

        with suppress(UserError):  # what was seen last must do
            refresh(run, Endpoint(profile_of(run)))
    view = RunView(run.folder, run.record.steps)
    view.refresh()
    return view


def report_pages(reference: str) -> list[Path]:
    """HTML reports that the steps of a run wrote.

    Raises:
        UserError: there is none, or none within reach.
    """
    run = find_run(Home.current(), reference)
    pages = []
    for manifest in manifests_of(run).values():
        if any(entry.path == REPORT for entry in manifest.files):
            with suppress(UserError):
                pages.append(manifest.path(REPORT))
    if not pages and run.record.place:
        pages = _tracked_reports(run)
    if not pages:
        where = f"; look at {run.record.place['url']}" if run.record.place.get("url") else ""
        raise UserError(f"report: {run.id} has no report within reach{where}")
    return pages


def _tracked(run: Run) -> tuple[Any, list[Any]]:
    """MLflow's client and its runs of a run on a cluster, the parent first."""
    from modelmill.components.core import mlflow_store
    from modelmill.components.core.mlflow_writer import RUN_TAG, STEP_TAG
    from modelmill.pipelines.launch.kubeflow_runs import profile_of
    from modelmill.pipelines.launch.tracked import tracking_uri
    from modelmill.pipelines.plan import stored_recipe

    uri = tracking_uri(profile_of(run))
    if not uri:
        return None, []
    try:
        client = mlflow_store.connect(uri)
        experiment = client.get_experiment_by_name(stored_recipe(run.folder).tracking.experiment)
    except mlflow_store.StoreUnavailable:
        return None, []
    if experiment is None:
        return None, []
    query = f"tags.`{RUN_TAG}` = '{run.record.place['run_id']}'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1000)
    return client, sorted(found, key=lambda each: STEP_TAG in each.data.tags)


def _tracked_manifests(run: Run, steps: list[str]) -> dict[str, Manifest]:
    """Manifests that the run's end sent to MLflow."""
    client, found = _tracked(run)
    if not found:
        return {}
    folder = run.folder / "manifests"
    manifests = {}
    for step in steps:
        folder.mkdir(exist_ok=True)
        with suppress(Exception):  # that step sent none: whatever the artifact store calls it
            path = client.download_artifacts(found[0].info.run_id, f"manifests/{step}/manifest.json", str(folder))
            manifests[step] = Manifest.read(path)
    return manifests


def _tracked_reports(run: Run) -> list[Path]:
    """Reports among the artifacts of the run's steps in MLflow, copied into the run's folder."""
    client, found = _tracked(run)
    pages = []
    for each in found:
        for folder in ("", *(entry.path for entry in client.list_artifacts(each.info.run_id) if entry.is_dir)):
            for entry in client.list_artifacts(each.info.run_id, folder or None):
                if entry.path.rpartition("/")[2] == REPORT:
                    target = run.folder / "reports" / each.info.run_name
                    target.mkdir(parents=True, exist_ok=True)
                    pages.append(Path(client.download_artifacts(each.info.run_id, entry.path, str(target))))
    return pages


def fetch_model(uri: str, output: Path) -> dict[str, Any]:
    """Download a registered model into a folder.

    Args:
        uri: `models:/name/version` or `models:/name@alias`.
        output: new or empty folder.

    Raises:
        UserError: MLflow has no such model, or cannot be reached.
    """
    from modelmill.components.core import mlflow_store

    tracking = Home.current().tracking_uri
    try:
        mlflow_store.connect(tracking)
    except mlflow_store.StoreUnavailable as error:
        raise UserError(f"MLFLOW_TRACKING_URI: {mlflow_store.safe_uri(tracking)} cannot be used ({error})") from None
    import mlflow

    mlflow.set_tracking_uri(tracking)
    with _filled(output) as folder:
        try:
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))
        except Exception as error:
            raise UserError(f"model: {uri} cannot be fetched: {mlflow_store.one_line(error)}") from None
    files = sum(path.is_file() for path in output.rglob("*"))
    return {"source": uri, "uri": uri, "files": files, "folder": str(output)}
