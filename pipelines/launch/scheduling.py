"""Recurring runs of Kubeflow Pipelines, by name: made once, changed when the recipe changes, paused, deleted.

The SDK's own function ignores its caching argument for uploaded pipelines, wants a version although it says otherwise,
and makes a second schedule of the same name without a word. Here a schedule is what its name says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from modelmill.components.core.errors import UserError
from modelmill.pipelines.launch.kubeflow import Endpoint, equals
from modelmill.pipelines.launch.kubeflow_runs import upload
from modelmill.pipelines.launch.platform_tasks import Placement, check_admissible, cluster_sections

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_EVERY = re.compile(r"(\d+)([smhd])")
_FIELD = re.compile(r"[\d*/,\-?LW#A-Za-z]+")


@dataclass(frozen=True)
class Timing:
    """When a schedule runs.

    Attributes:
        cron: six fields, seconds first; empty with an interval.
        every: seconds between two runs; 0 with a cron expression.
        catchup: make up for what was missed while it was paused or the cluster was down.
        concurrency: runs of the schedule at one time.
    """

    cron: str = ""
    every: int = 0
    catchup: bool = False
    concurrency: int = 1


@dataclass(frozen=True)
class Schedule:
    """A schedule at an endpoint."""

    name: str
    id: str
    enabled: bool
    timing: Timing
    pipeline_id: str
    version_id: str
    parameters: Mapping[str, Any]
    account: str

    def describe(self) -> dict[str, Any]:
        """For programs."""
        record = asdict(self)
        return {key: value for key, value in record.items() if key != "parameters"}


def read_every(text: str) -> int:
    """Seconds of `90s`, `30m`, `6h` or `1d`.

    Raises:
        UserError: it is none of these.
    """
    found = _EVERY.fullmatch(text.strip())
    if not found or int(found[1]) == 0:
        raise UserError(f"--every: {text!r} is no interval; write for example 30m, 6h or 1d")
    return int(found[1]) * _UNITS[found[2]]


def read_cron(text: str) -> str:
    """A cron expression with six fields, as KFP takes it; five fields get a second 0 in front.

    Raises:
        UserError: it has neither five nor six fields.
    """
    fields = text.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6 or not all(_FIELD.fullmatch(field) for field in fields):
        raise UserError(f"--cron: {text!r} is no cron expression; write for example '0 0 6 * * *' (second first)")
    return " ".join(fields)


def schedule(
    placement: Placement, name: str, timing: Timing, endpoint: Endpoint | None = None
) -> tuple[Schedule, Literal["created", "updated", "unchanged"]]:
    """Make a schedule what it should be: at most one has the name afterwards.

    The new one is made before the old one goes: an interruption leaves two, which the next call mends, and never none.
    A paused schedule stays paused.

    Args:
        placement: recipe and profile.
        name: of the schedule.
        timing: when it runs.

    Raises:
        UserError: the pair is not admissible, or the endpoint refuses.
    """
    check_admissible(placement.recipe, placement.profile)
    endpoint = endpoint or Endpoint(placement.profile)
    sections = cluster_sections(placement.recipe)
    version = upload(placement, sections, endpoint)
    old = find(endpoint, name)
    account = placement.profile.service_account
    wanted = (timing, version.version_id, account, dict(sections))
    same = [each for each in old if (each.timing, each.version_id, each.account, dict(each.parameters)) == wanted]
    if same:
        for each in old:
            if each.id != same[0].id:
                delete(endpoint, each)
        return same[0], "unchanged"
    enabled = all(each.enabled for each in old)
    experiment = endpoint.experiment(placement.recipe.tracking.experiment)
    body = _body(name, timing, version.pipeline_id, version.version_id, experiment, sections, account, enabled)
    body.description = placement.recipe.description
    api = endpoint.api.recurring_runs
    try:
        made = endpoint.call(api.recurring_run_service_create_recurring_run, body, repeat=False)
    except UserError:
        made = None  # it may have arrived all the same: look
        if not [each for each in find(endpoint, name) if each.id not in {other.id for other in old}]:
            raise
    for each in old:
        delete(endpoint, each)
    now = find(endpoint, name)
    chosen = next((each for each in now if made is None or each.id == made.recurring_run_id), now[0])
    return chosen, "updated" if old else "created"


def _body(
    name: str,
    timing: Timing,
    pipeline_id: str,
    version_id: str,
    experiment: str,
    sections: Mapping[str, str],
    account: str,
    enabled: bool,
) -> Any:
    import kfp_server_api as models

    if timing.cron:
        trigger = models.V2beta1Trigger(cron_schedule=models.V2beta1CronSchedule(cron=timing.cron))
    else:
        # The API's 64-bit numbers are text.
        periodic = models.V2beta1PeriodicSchedule(interval_second=str(timing.every))
        trigger = models.V2beta1Trigger(periodic_schedule=periodic)
    return models.V2beta1RecurringRun(
        display_name=name,
        experiment_id=experiment,
        pipeline_version_reference=models.V2beta1PipelineVersionReference(
            pipeline_id=pipeline_id, pipeline_version_id=version_id
        ),
        runtime_config=models.V2beta1RuntimeConfig(parameters=dict(sections)),
        service_account=account,
        trigger=trigger,
        max_concurrency=str(timing.concurrency),
        no_catchup=not timing.catchup,
        mode=models.RecurringRunMode.ENABLE if enabled else models.RecurringRunMode.DISABLE,
    )


def schedules(endpoint: Endpoint) -> list[Schedule]:
    """Every schedule of the namespace, by name."""
    return sorted(_listed(endpoint), key=lambda each: each.name)


def find(endpoint: Endpoint, name: str) -> list[Schedule]:
    """Schedules of a name: one, none, or several when somebody else made them."""
    return [each for each in _listed(endpoint, filter=equals("display_name", name)) if each.name == name]


def one(endpoint: Endpoint, name: str) -> Schedule:
    """The schedule of a name.

    Raises:
        UserError: there is none.
    """
    from modelmill.components.core.recipe import suggest

    found = find(endpoint, name)
    if not found:
        known = [each.name for each in schedules(endpoint)]
        hint = suggest(name, known) if known else "there is none; make one with `modelmill schedule`"
        raise UserError(f"schedule: no schedule is called {name!r}; {hint}")
    return found[0]


def set_enabled(endpoint: Endpoint, name: str, enabled: bool) -> None:
    """Pause every schedule of a name, or let it go on."""
    one(endpoint, name)
    api = endpoint.api.recurring_runs
    action = (
        api.recurring_run_service_enable_recurring_run if enabled else api.recurring_run_service_disable_recurring_run
    )
    for each in find(endpoint, name):
        endpoint.call(action, each.id)


def delete(endpoint: Endpoint, each: Schedule) -> None:
    """Delete a schedule; its runs stay."""
    from modelmill.pipelines.launch.kubeflow import NotThere

    try:
        endpoint.call(endpoint.api.recurring_runs.recurring_run_service_delete_recurring_run, each.id)
    except NotThere:
        return


def _listed(endpoint: Endpoint, **named: Any) -> list[Schedule]:
    action = endpoint.api.recurring_runs.recurring_run_service_list_recurring_runs
    return [_read(each) for each in endpoint.listed(action, "recurring_runs", **endpoint.where, **named)]


def _read(found: Any) -> Schedule:
    trigger, reference = found.trigger, found.pipeline_version_reference
    cron = trigger.cron_schedule.cron if trigger and trigger.cron_schedule else ""
    every = int(trigger.periodic_schedule.interval_second or 0) if trigger and trigger.periodic_schedule else 0
    concurrency = int(found.max_concurrency or 1)
    return Schedule(
        name=str(found.display_name),
        id=str(found.recurring_run_id),
        enabled=str(found.mode or found.status) in ("ENABLE", "ENABLED"),
        timing=Timing(cron or "", every, catchup=not found.no_catchup, concurrency=concurrency),
        pipeline_id=str(reference.pipeline_id) if reference else "",
        version_id=str(reference.pipeline_version_id) if reference else "",
        parameters=(found.runtime_config.parameters or {}) if found.runtime_config else {},
        account=str(found.service_account or ""),
    )
