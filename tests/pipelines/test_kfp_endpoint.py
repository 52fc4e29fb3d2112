"""The endpoint: logins, a busy or lost server, uploads by content, schedules by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.events import append_line
from modelmill.pipelines.launch import kubeflow_runs, scheduling
from modelmill.pipelines.launch.kubeflow import Endpoint
from modelmill.pipelines.launch.platform_tasks import Placement
from modelmill.pipelines.launch.runs import Run, all_runs
from modelmill.pipelines.launch.scheduling import Schedule, Timing
from tests.fakes.kfp_api import Refused, read_package
from tests.pipelines.cluster import Cluster, cluster
from tests.pipelines.conftest import recipe

DAILY = Timing(cron="0 0 6 * * *")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_store: str) -> Iterator[Cluster]:
    with cluster(tmp_path, monkeypatch, shared_store) as found:
        yield found


def asked(here: Cluster, method: str, path: str) -> int:
    return sum(verb == method and path in address for verb, address in here.api.requests)


@pytest.mark.parametrize(
    ("auth", "variable", "value"),
    [("token", "KF_PIPELINES_TOKEN", "secret"), ("cookies", "KF_PIPELINES_COOKIES", "authservice_session=abc")],
)
def test_logins(here: Cluster, monkeypatch: pytest.MonkeyPatch, auth: str, variable: str, value: str) -> None:
    here.api.token = value if auth == "token" else None
    here.api.cookie = value if auth == "cookies" else None
    config = {"endpoint": here.api.url, "auth": auth}
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=rf"kfp.auth: \w+ needs \${variable}"):
        here.endpoint(kfp=config)
    monkeypatch.setenv(variable, "wrong")
    with pytest.raises(UserError, match=rf"does not know you \(401 .*\); .*\${variable}"):
        here.endpoint(kfp=config)
    monkeypatch.setenv(variable, value)
    assert here.endpoint(kfp=config).namespace == "modelmill"


def test_a_service_account_logs_in_with_its_projected_token(here: Cluster, tmp_path: Path) -> None:
    here.api.token = "projected"
    config = {"endpoint": here.api.url, "auth": "service-account", "token_path": str(tmp_path / "token")}
    with pytest.raises(UserError, match=r"kfp.token_path: .* is no file"):
        here.endpoint(kfp=config)
    (tmp_path / "token").write_text("projected")
    assert here.endpoint(kfp=config).experiment("one")


def test_a_forbidden_namespace_and_a_dead_server_are_one_line(here: Cluster) -> None:
    with pytest.raises(UserError, match=r"forbids it \(403 .*'other'"):
        here.endpoint(namespace="other").experiment("x")
    with pytest.raises(UserError, match=r"kfp.endpoint: http://127.0.0.1:9 does not answer"):
        here.endpoint(kfp={"endpoint": "http://127.0.0.1:9"})


def test_a_profile_without_an_address_says_where_to_set_it(here: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(UserError, match=r"kfp.endpoint: empty"):
        here.endpoint(kfp={})
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", here.api.url)
    assert here.endpoint(kfp={}).address == here.api.url


def test_a_server_for_one_team_hears_of_no_namespace(here: Cluster) -> None:
    here.api.multi_user = False
    assert here.submit().state == "running"


def test_a_busy_server_is_asked_again(here: Cluster) -> None:
    for code in (429, 503, 500):
        here.api.fail(code, method="GET")
    assert here.submit().state == "running"
    here.api.fail(503, method="GET", times=99)
    with pytest.raises(UserError, match=r"answered 503 \(scripted 503\); try again later"):
        here.endpoint()


@pytest.mark.parametrize("fault", ["lost", 429], ids=str)
@pytest.mark.parametrize("path", ["/runs", "upload_version", "/pipelines$", "/experiments"])
def test_what_may_have_happened_is_looked_up_before_it_is_repeated(here: Cluster, fault: int | str, path: str) -> None:
    here.api.fail(fault, method="POST", path=path)
    run = here.submit()
    assert [len(table) for table in (here.api.pipelines, here.api.versions, here.api.experiments, here.api.runs)] == [
        1,
        1,
        1,
        1,
    ]
    assert list(here.api.runs) == [run.record.place["run_id"]]


def test_a_refused_run_is_remembered_as_failed_and_not_repeated(here: Cluster) -> None:
    here.api.fail(400, method="POST", path="/runs", times=9)
    with pytest.raises(UserError, match=r"refuses \(400 scripted"):
        here.submit()
    (run,) = all_runs(kubeflow_runs.Home.current())
    assert (run.state, run.record.exit_code) == ("failed", 2)
    assert asked(here, "POST", "/runs") == 1


def test_content_decides_the_version(here: Cluster) -> None:
    names = [
        here.submit(each).record.place["pipeline_version"] for each in (recipe(), recipe(), recipe(words__text="x"))
    ]
    assert names[0] == names[1] != names[2]
    other = here.submit(environment={"A": "1"}).record.place["pipeline_version"]
    assert other not in names
    assert len(here.api.versions) == 3
    assert len(here.api.pipelines) == 1
    assert len(here.api.runs) == 4


def test_many_pages_are_one_list(here: Cluster) -> None:
    endpoint = here.endpoint()
    ids = [here.submit().record.place["run_id"] for _ in range(5)]
    assert [each.run_id for each in endpoint.runs(20)] == ids[::-1]
    assert [each.run_id for each in endpoint.runs(4)] == ids[:0:-1]


def test_states_of_tasks_become_events_once(here: Cluster) -> None:
    run = here.submit()
    run_id, endpoint = run.record.place["run_id"], here.endpoint()
    here.api.set_task(run_id, "write-words", "SUCCEEDED")
    here.api.set_task(run_id, "count-words", "RUNNING")
    for _ in range(2):
        view = kubeflow_runs.refresh(run, endpoint)
    assert {name: step.state for name, step in view.steps.items()} == {
        "write_words": "finished",
        "count_words": "running",
        "announce": "waiting",
        "archive": "waiting",
    }
    assert len((run.folder / "events.jsonl").read_text().splitlines()) == 3
    here.api.set_task(run_id, "count-words", "FAILED", error={"code": 1, "message": "OOMKilled"})
    here.api.end(run_id, "FAILED")
    view = kubeflow_runs.refresh(run, endpoint)
    assert view.steps["count_words"].message == "OOMKilled"
    assert (Run.open(run.folder).state, run.record.message) == ("failed", "count_words: OOMKilled")


def test_a_loop_runs_while_one_of_its_tasks_does_and_fails_with_one(here: Cluster) -> None:
    run = here.submit()
    run_id, endpoint = run.record.place["run_id"], here.endpoint()
    folder = here.home_of(run)
    folder.mkdir(parents=True)

    def state() -> str:
        return kubeflow_runs.refresh(run, endpoint).steps["count_words"].state

    for task in "012":
        here.api.set_task(run_id, "count-words", "RUNNING", task_id=task)
    here.api.set_task(run_id, "count-words", "FAILED", task_id="0")
    here.api.set_task(run_id, "count-words", "SUCCEEDED", task_id="2")
    append_line(folder / "events.jsonl", {"step": "count_words-0", "event": "failed", "message": "no words"})
    append_line(folder / "events.jsonl", {"step": "count_words-2", "event": "finished", "metrics": {"loss": 1.0}})
    assert state() == "running"
    here.api.set_task(run_id, "count-words", "SUCCEEDED", task_id="1")
    assert state() == "failed"
    here.api.end(run_id, "FAILED")
    view = kubeflow_runs.refresh(run, endpoint)
    assert Run.open(run.folder).record.message == "count_words: no words"
    assert view.steps["count_words"].metrics == {}


def test_an_endpoint_that_goes_away_for_a_while_does_not_end_the_watching(here: Cluster) -> None:
    run = here.submit()
    here.api.end(run.record.place["run_id"], "SUCCEEDED")
    here.api.fail(503, method="GET", path="/runs/", times=6)
    assert here.follow(run).exit_code == 0


def make(here: Cluster, timing: Timing = DAILY, **settings: object) -> tuple[Schedule, str]:
    return scheduling.schedule(Placement(recipe(**settings), here.profile(), "words"), "nightly", timing)


def test_the_same_schedule_twice_is_one(here: Cluster) -> None:
    first, change = make(here)
    assert change == "created"
    (kept,) = here.api.recurring.values()
    assert kept["trigger"] == {"cron_schedule": {"cron": "0 0 6 * * *"}}
    assert (kept["no_catchup"], kept["max_concurrency"], kept["mode"]) == (True, "1", "ENABLE")
    assert set(kept["runtime_config"]["parameters"]) == {"write_words", "count_words", "announce", "archive"}
    again, change = make(here)
    assert (again.id, change) == (first.id, "unchanged")
    assert asked(here, "POST", "/recurringruns") == 1


def test_changed_content_or_time_replaces_a_schedule_and_leaves_it_paused(here: Cluster) -> None:
    first, _ = make(here)
    endpoint = here.endpoint()
    scheduling.set_enabled(endpoint, "nightly", False)
    second, change = make(here, words__text="other")
    assert (change, second.enabled) == ("updated", False)
    assert second.version_id != first.version_id
    scheduling.set_enabled(endpoint, "nightly", True)
    third, change = make(here, Timing(every=3600, concurrency=2, catchup=True), words__text="other")
    assert (change, third.enabled, third.timing) == ("updated", True, Timing("", 3600, True, 2))
    assert list(here.api.recurring) == [third.id]


def test_an_interruption_leaves_a_schedule_and_the_next_call_mends_it(here: Cluster) -> None:
    first, _ = make(here)
    here.api.fail(503, method="DELETE", path="recurringruns", times=9)
    with pytest.raises(UserError, match="answered 503"):
        make(here, words__text="other")
    assert len(here.api.recurring) == 2
    here.api.heal()
    mended, _ = make(here, words__text="other")
    assert list(here.api.recurring) == [mended.id] != [first.id]


def test_a_schedule_that_was_made_without_an_answer_is_found(here: Cluster) -> None:
    here.api.fail("lost", method="POST", path="recurringruns")
    made, change = make(here)
    assert (list(here.api.recurring), change) == ([made.id], "created")
    here.api.fail("drop", method="POST", path="recurringruns")
    with pytest.raises(UserError, match="does not answer"):
        make(here, words__text="other")
    assert list(here.api.recurring) == [made.id]


def test_schedules_are_listed_paused_and_deleted_by_name(here: Cluster) -> None:
    endpoint = here.endpoint()
    for name in ("d", "b", "a", "c"):
        scheduling.schedule(Placement(recipe(), here.profile(), "words"), name, DAILY)
    assert [each.name for each in scheduling.schedules(endpoint)] == ["a", "b", "c", "d"]
    with pytest.raises(UserError, match="no schedule is called 'nightly'"):
        scheduling.set_enabled(endpoint, "nightly", False)
    scheduling.set_enabled(endpoint, "b", False)
    assert [each.name for each in scheduling.schedules(endpoint) if not each.enabled] == ["b"]
    scheduling.delete(endpoint, scheduling.one(endpoint, "b"))
    scheduling.delete(endpoint, scheduling.find(endpoint, "a")[0])
    assert [each.name for each in scheduling.schedules(endpoint)] == ["c", "d"]


def test_times_of_schedules() -> None:
    assert scheduling.read_cron("0 6 * * 1-5") == "0 0 6 * * 1-5"
    assert scheduling.read_cron("30 0 6 ? * MON") == "30 0 6 ? * MON"
    assert [scheduling.read_every(text) for text in ("90s", "30m", "6h", "1d")] == [90, 1800, 21600, 86400]
    for text in ("* * *", "a b c d e f g", "0 0 6 * * $"):
        with pytest.raises(UserError, match="--cron"):
            scheduling.read_cron(text)
    for text in ("6", "0h", "h", "-1h", "1.5h"):
        with pytest.raises(UserError, match="--every"):
            scheduling.read_every(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("schemaVersion: 2.1.0", "schemaVersion: 2.1.0\nsurprise: 1"), "surprise"),
        (("imagePullPolicy:", "imagePullPolicies:"), "imagePullPolicies"),
        (("name: comp-archive", "name: comp-nowhere"), "names a component that is not defined"),
    ],
    ids=["pipeline", "platform", "reference"],
)
def test_the_fake_refuses_what_is_no_pipeline(
    here: Cluster, tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    from modelmill.pipelines.launch.package import compile_recipe
    from modelmill.pipelines.launch.platform_tasks import cluster_sections

    target = tmp_path / "p.yaml"
    compile_recipe(recipe(), cluster_sections(recipe()), target, Placement(recipe(), here.profile()))
    text = target.read_text()
    read_package(text)
    assert change[0] in text
    with pytest.raises(Refused, match=words):
        read_package(text.replace(*change, 1))


def test_requests_of_a_submission_are_few(here: Cluster) -> None:
    endpoint = Endpoint(here.profile())
    kubeflow_runs.submit(Placement(recipe(), here.profile(), "words"), endpoint=endpoint)
    assert endpoint.requests <= 9
