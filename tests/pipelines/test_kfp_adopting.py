"""Resuming a run that another machine submitted: rebuilt from what KFP keeps, and refused when that does not fit."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.pod import announcement, read_announcement
from modelmill.pipelines import catalog
from modelmill.pipelines.cli import cli
from modelmill.pipelines.launch import kubeflow_runs
from modelmill.pipelines.launch.adopting import adopt
from modelmill.pipelines.launch.runs import Run, all_runs
from tests.pipelines.cluster import Cluster, cluster
from tests.pipelines.conftest import recipe, states

ANNOUNCEMENT = "MODELMILL_ANNOUNCEMENT"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str) -> Iterator[Cluster]:
    with cluster(tmp_path, monkeypatch, shared_store) as found:
        yield found


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Home]:
    """Makes this process another machine, which has never heard of a run."""

    def leave() -> Home:
        monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "elsewhere"))
        return Home.current()

    return leave


def failed(here: Cluster, **changes: object) -> Run:
    """A run that was submitted and failed after its first step, as the API describes it."""
    run = here.submit(recipe(words__text="'here and there'"), **changes)
    run_id = run.record.place["run_id"]
    here.api.set_task(run_id, "write-words", "SUCCEEDED")
    here.api.set_task(run_id, "count-words", "FAILED")
    here.api.end(run_id, "FAILED")
    return run


def id_of(run: Run) -> str:
    return run.record.place["run_id"]


@pytest.mark.slow
def test_a_run_of_another_machine_goes_on_here_without_repeating_side_effects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str, elsewhere: Callable[[], Home]
) -> None:
    ledger, flag = tmp_path / "ledger", tmp_path / "flag"
    flag.touch()
    with cluster(tmp_path, monkeypatch, shared_store, execute=True) as here:
        first = here.run(recipe(announce__ledger=ledger, archive__fail_while=flag))
        assert first.state == "failed"
        flag.unlink()
        home = elsewhere()
        taken = adopt(id_of(first.run), here.profile())
        assert [run.id for run in all_runs(home)] == [first.run.id]
        resumed = here.follow(kubeflow_runs.resume(taken))
    assert resumed.exit_code == 0, resumed.message
    assert resumed.run.record.resumed_from == first.run.id
    reused = dict.fromkeys(("write_words", "count_words", "announce"), "reused")
    assert states(resumed) == reused | {"archive": "finished"}
    assert ledger.read_text() == "19\n"


def test_what_is_taken_up_is_what_was_submitted(here: Cluster, elsewhere: Callable[[], Home]) -> None:
    run = failed(here)
    profile = here.profile()
    elsewhere()
    taken = adopt(id_of(run), profile)
    for file in ("recipe.yaml", "sections.json", "profile.json"):
        assert (taken.folder / file).read_text() == (run.folder / file).read_text()
    same = ("run_id", "recipe", "recipe_hash", "pipeline", "dag", "steps", "headline", "place")
    assert {name: getattr(taken.record, name) for name in same} == {name: getattr(run.record, name) for name in same}
    resumed = kubeflow_runs.resume(taken)
    assert resumed.record.finished_before == ["write_words"]
    assert here.api.runs[id_of(resumed)]["runtime_config"]["parameters"] == run.sections()
    assert adopt(id_of(run), profile).folder == taken.folder, "known by now"
    here.api.end(id_of(resumed), "FAILED")
    again = kubeflow_runs.resume(resumed)
    elsewhere_still = adopt(id_of(resumed), profile)
    assert elsewhere_still.id == resumed.id
    assert again.record.finished_before == ["write_words"], "what an earlier run had finished counts too"


def test_steps_that_finished_in_earlier_runs_are_known_to_a_third_machine(
    here: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resumed = kubeflow_runs.resume(failed(here))
    here.api.end(id_of(resumed), "FAILED")
    monkeypatch.setenv("MODELMILL_HOME", str(tmp_path / "third"))
    assert adopt(id_of(resumed), here.profile()).record.finished_before == ["write_words"]


def test_a_scheduled_run_is_taken_up_under_a_name_of_its_own(here: Cluster, elsewhere: Callable[[], Home]) -> None:
    run = failed(here)
    there = here.api.runs[id_of(run)]
    there |= {"display_name": "../nightly 3", "runtime_config": {}}  # the defaults of its version
    elsewhere()
    taken = adopt(id_of(run), here.profile())
    assert taken.folder.parent == Home.current().runs
    assert "nightly" not in taken.id
    assert taken.sections() == run.sections()


def test_by_command(
    here: Cluster, elsewhere: Callable[[], Home], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = failed(here)
    (tmp_path / "test.yaml").write_text(here.profile().model_dump_json())
    monkeypatch.setenv("MODELMILL_PROFILES", str(tmp_path))
    elsewhere()
    done = CliRunner().invoke(cli, ["resume", id_of(run), "--profile", "test", "--detach"])
    assert done.exit_code == 0, (done.output, done.exception)
    taken, resumed = all_runs(Home.current())
    assert (taken.id, taken.state) == (run.id, "failed")
    assert resumed.record.resumed_from == run.id
    assert f"run {resumed.id} started" in done.output


def executors(here: Cluster) -> list[dict[str, Any]]:
    (package,) = here.api.packages.values()
    return [each["container"] for each in package["pipeline"]["deploymentSpec"]["executors"].values()]


def put(here: Cluster, name: str, value: str) -> None:
    """Change a variable of every step in the compiled pipeline."""
    for container in executors(here):
        for variable in container["env"]:
            if variable["name"] == name:
                variable["value"] = value


def announced(here: Cluster) -> dict[str, Any]:
    env = {each["name"]: each["value"] for each in executors(here)[0]["env"]}
    return read_announcement(env[ANNOUNCEMENT])


def other_hash(here: Cluster, run: dict[str, Any]) -> None:
    put(here, "MODELMILL_RECIPE_HASH", "0" * 16)


def other_recipe(here: Cluster, run: dict[str, Any]) -> None:
    record = announced(here)
    record["recipe"]["words"]["text"] = "something else"
    put(here, ANNOUNCEMENT, announcement(record))


def later_parameter(here: Cluster, run: dict[str, Any]) -> None:
    record = announced(here)
    record["recipe"]["words"]["language"] = "en"
    put(here, ANNOUNCEMENT, announcement(record))


def other_pipeline(here: Cluster, run: dict[str, Any]) -> None:
    record = announced(here)
    record["recipe"]["pipeline"] = "theirs"
    put(here, ANNOUNCEMENT, announcement(record))


def long_recipe(here: Cluster, run: dict[str, Any]) -> None:
    put(here, ANNOUNCEMENT, announcement({**announced(here), "recipe": {}}))


def garbage(here: Cluster, run: dict[str, Any]) -> None:
    put(here, ANNOUNCEMENT, "no base64!")


def bomb(here: Cluster, run: dict[str, Any]) -> None:
    text = json.dumps(announced(here)).encode() + b" " * 60_000_000  # JSON all the same
    put(here, ANNOUNCEMENT, base64.b64encode(zlib.compress(text)).decode())


def no_record(here: Cluster, run: dict[str, Any]) -> None:
    put(here, ANNOUNCEMENT, announcement([1, 2]))  # type: ignore[arg-type]


def foreign(here: Cluster, run: dict[str, Any]) -> None:
    for container in executors(here):
        container["env"] = []


def edited(here: Cluster, run: dict[str, Any]) -> None:
    parameters = run["runtime_config"]["parameters"]
    section = json.loads(parameters["write_words"])
    section["config"]["text"] = "edited on the page of KFP"
    parameters["write_words"] = json.dumps(section)


def no_json(here: Cluster, run: dict[str, Any]) -> None:
    run["runtime_config"]["parameters"]["count_words"] = "{"


def odd_code(here: Cluster, run: dict[str, Any]) -> None:
    parameters = run["runtime_config"]["parameters"]
    parameters["archive"] = json.dumps({**json.loads(parameters["archive"]), "code": "../../etc"})


def more_steps(here: Cluster, run: dict[str, Any]) -> None:
    run["runtime_config"]["parameters"]["shred_words"] = "{}"


def no_source(here: Cluster, run: dict[str, Any]) -> None:
    del run["pipeline_version_reference"]


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (other_hash, r"has the hash 0{16} and \w{16} at KFP and \w{16} here; .* take its code"),
        (other_recipe, r"has the hash \w{16} at KFP and \w{16} here; it was submitted by modelmill \S+, this is \S+:"),
        (later_parameter, r"not one of this installation \(words.language: no such parameter.*take its code"),
        (other_pipeline, r"not one of this installation \(pipeline: 'theirs' is not in this installation's catalog"),
        (long_recipe, r"is too long to travel with a run; resume it where it was submitted"),
        (garbage, rf"{ANNOUNCEMENT} of \S+ at KFP is not readable"),
        (bomb, rf"{ANNOUNCEMENT} of \S+ at KFP is not readable"),
        (no_record, rf"{ANNOUNCEMENT} of \S+ at KFP is not readable"),
        (foreign, r"is none that `modelmill run` or `modelmill schedule` started"),
        (edited, r"parameter write_words of \S+ is not what its recipe says, so it was changed at KFP; start anew"),
        (no_json, r"parameter count_words of \S+ at KFP is not readable"),
        (odd_code, r"parameter archive of \S+ at KFP is not readable \(code: String should match"),
        (more_steps, r"the steps of \S+ are not those of sample here \(shred_words\)"),
        (no_source, r"is none that `modelmill run` or `modelmill schedule` started"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_does_not_fit_is_refused_and_not_kept(
    here: Cluster,
    elsewhere: Callable[[], Home],
    tamper: Callable[[Cluster, dict[str, Any]], None],
    problem: str,
) -> None:
    run = failed(here)
    tamper(here, here.api.runs[id_of(run)])
    refused(here, id_of(run), elsewhere(), problem)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"images": {"registry": "other.example"}}, r"images.cpu was registry.example/\S+ and is other.example/"),
        ({"home": {"claim": "home", "mount": "/mnt/other"}}, r"home.mount was \S+ and is /mnt/other"),
        ({"store": "s3://bucket/outputs"}, r"store was not set and is s3://bucket/outputs"),
        ({"where": "laptop"}, r"profile: test is for this machine; choose one of a cluster"),
    ],
    ids=["image", "mount", "store", "laptop"],
)
def test_a_profile_that_would_find_nothing_again_is_refused(
    here: Cluster, elsewhere: Callable[[], Home], changes: dict[str, Any], problem: str
) -> None:
    refused(here, id_of(failed(here)), elsewhere(), problem, **changes)


def test_another_volume_of_the_same_path_is_refused(here: Cluster, elsewhere: Callable[[], Home]) -> None:
    changes = {"home": {"claim": "scratch", "mount": str(here.mount)}}
    refused(here, id_of(failed(here)), elsewhere(), "home.claim was home and is scratch", **changes)


def test_another_launcher_is_refused_as_the_training_job_would_be_another(
    here: Cluster, elsewhere: Callable[[], Home], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODELMILL_CATALOG")
    job = {"cpu": "4", "memory": "8Gi", "runtime": "torch"}
    changes: dict[str, Any] = {"launcher": "trainjob", "trainjob": job}
    run = here.submit(catalog.load("laptop/llama-demo"), **changes)
    here.api.end(id_of(run), "FAILED")
    machine = elsewhere()
    refused(here, id_of(run), machine, "--profile: test is not what .* launcher was trainjob and is not set")
    queue = {"launcher": "trainjob", "trainjob": {**job, "queue": "big"}}
    refused(here, id_of(run), machine, "name one that is: trainjob.queue was not set and is big$", **queue)
    assert adopt(id_of(run), here.profile(**changes)).sections() == run.sections()


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ("SUCCEEDED", "succeeded; there is nothing to resume"),
        ("RUNNING", r"is still running; end it with `modelmill cancel \S+ --profile test` first"),
        ("CANCELING", "is still running"),
    ],
)
def test_only_what_ended_too_early_is_resumed(
    here: Cluster, elsewhere: Callable[[], Home], state: str, problem: str
) -> None:
    run = here.submit()
    here.api.end(id_of(run), state)
    refused(here, id_of(run), elsewhere(), problem)


def test_an_id_that_kfp_does_not_know_is_named(here: Cluster, elsewhere: Callable[[], Home]) -> None:
    refused(here, "no-such-run", elsewhere(), "no-such-run not found")


def refused(here: Cluster, run_id: str, machine: Home, problem: str, **changes: object) -> None:
    """The run is not taken up, nothing is remembered, and nothing was sent."""
    here.api.requests.clear()
    with pytest.raises(UserError, match=problem) as error:
        adopt(run_id, here.profile(**changes))
    assert len(str(error.value)) < 700
    assert not all_runs(machine)
    assert all(method == "GET" for method, _ in here.api.requests)
