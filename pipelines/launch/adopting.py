"""A run on a cluster that another machine or a schedule submitted, taken up here so that it can be resumed.

KFP keeps all that is needed: a run's parameters are the sections of its steps, and the pipeline version it ran carries
the recipe (`core.pod.announcement`) and the place of every step. Anybody who may submit there can have written it, so
it is checked against this installation and against the profile before this machine remembers the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelmill.components.core import code
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import HOME_VARIABLE, Home
from modelmill.components.core.pod import ANNOUNCEMENT_VARIABLE, read_announcement
from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.core.step import FINISHED_VARIABLE, RECIPE_VARIABLE
from modelmill.components.core.store import STORE_VARIABLE
from modelmill.components.training.launch import LAUNCHER_VARIABLE
from modelmill.pipelines import catalog as catalogs
from modelmill.pipelines.launch.kubeflow import Endpoint, ended_as
from modelmill.pipelines.launch.kubeflow_runs import check_resumable, remember
from modelmill.pipelines.launch.platform_tasks import STEP_LABEL, Placement, check_admissible, launcher_record
from modelmill.pipelines.launch.runs import Run, all_runs
from modelmill.pipelines.plan import declared_options
from modelmill.pipelines.platform import ImageFamily, Profile

_ANNOUNCEMENT_LIMIT = 64 * 1024  # characters; ours are a quarter of it at most
_OWN_NAME = re.compile(r"\d{8}-\d{6}-[a-z0-9][a-z0-9-]{0,31}-[a-z0-9]{4}")
_SHOWN = 5  # differences of a profile that an error names
_ELSEWHERE = "resume it where it was submitted, or start anew with `modelmill run`"
Model = TypeVar("Model", bound=BaseModel)


class _Announcement(BaseModel):
    recipe: dict[str, Any]
    tags: dict[str, str] = {}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")

    step: str
    config: dict[str, Any]
    code: str = Field(pattern="^[0-9a-f]{16}$")
    fingerprint: str | None


class _Variable(BaseModel):
    name: str
    value: str = ""


class _Container(BaseModel):
    image: str
    env: list[_Variable] = []


class _Mount(BaseModel):
    claim: str = Field(default="", alias="constant")
    path: str = Field(alias="mountPath")


class _PodMetadata(BaseModel):
    labels: dict[str, str] = {}


class _Pod(BaseModel):
    metadata: _PodMetadata = Field(default=_PodMetadata(), alias="podMetadata")
    mounts: list[_Mount] = Field(default=[], alias="pvcMount")


class _Launcher(BaseModel):
    launcher: str
    config: dict[str, Any]


class _StepPlace(BaseModel):
    """Where one step ran, out of both parts of the compiled pipeline."""

    container: _Container
    pod: _Pod

    def variables(self) -> dict[str, str]:
        return {each.name: each.value for each in self.container.env}


def adopt(run_id: str, profile: Profile, *, home: Home | None = None, endpoint: Endpoint | None = None) -> Run:
    """A run by its id at KFP as one of this machine; one that it knows already is returned as it is.

    Args:
        run_id: KFP's id of a run that failed or was cancelled.
        profile: where it ran; its images, home, store and launcher must be those of the run.
        home: where this machine remembers the run.
        endpoint: made from the profile unless given.

    Raises:
        UserError: it cannot be resumed, this version of the code reads its recipe otherwise, its parameters are not
            those of its recipe, or the profile would put it elsewhere; nothing was kept.
    """
    home = home or Home.current()
    known = next((run for run in all_runs(home) if run.record.place.get("run_id") == run_id), None)
    if known is not None:
        return known
    profile.check_submittable()
    endpoint = endpoint or Endpoint(profile)
    found = endpoint.run(run_id)
    check_resumable(run_id, ended_as(found) or "running", f"{run_id} --profile {profile.name}")
    compiled, version = endpoint.compiled(found)
    places = _places(compiled, run_id)
    variables = next(iter(places.values())).variables()  # those that matter here are the same in every step
    announced = _announced(variables, run_id)
    recipe = _recipe(announced, variables, run_id)
    check_admissible(recipe, profile)
    sections = _sections(recipe, _parameters(found, compiled), run_id)
    _check_places(recipe, profile, places, run_id)
    names = {step.name for step in recipe.steps()}
    finished = names.intersection(variables.get(FINISHED_VARIABLE, "").split(","))
    reference = announced.tags.get("modelmill.recipe", "")
    placement = Placement(recipe, profile, reference if reference.isprintable() else "", tuple(sorted(finished)))
    name = str(found.display_name)
    free = _OWN_NAME.fullmatch(name) and not (home.runs / name).exists()
    return remember(
        placement,
        sections,
        home,
        endpoint,
        name=name if free else "",
        started=found.created_at.timestamp() if found.created_at else None,
        place={"run_id": run_id, "url": endpoint.run_url(run_id), "pipeline_version": version},
    )


def _read(model: type[Model], values: Any, what: str, run_id: str) -> Model:
    try:
        return model.model_validate_json(values) if isinstance(values, str) else model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"run: {what} of {run_id} at KFP is not readable ({place}: {first['msg']}); {_ELSEWHERE}"
        ) from None


def _at(values: Any, *path: str) -> Mapping[str, Any]:
    """A mapping inside of mappings; empty where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def _places(compiled: Mapping[str, Any], run_id: str) -> dict[str, _StepPlace]:
    """Place of every step by its name."""
    executors = _at(compiled, "pipeline_spec", "deploymentSpec", "executors")
    pods = _at(compiled, "platform_spec", "platforms", "kubernetes", "deploymentSpec", "executors")
    found = {}
    for label, executor in executors.items():
        values = {"container": _at(executor, "container"), "pod": _at(pods, label)}
        place = _read(_StepPlace, values, f"executor {label}", run_id)
        if ANNOUNCEMENT_VARIABLE in place.variables() and (step := place.pod.metadata.labels.get(STEP_LABEL)):
            found[step] = place
    if not found:
        raise UserError(f"run: {run_id} is none that `modelmill run` or `modelmill schedule` started; {_ELSEWHERE}")
    return found


def _announced(variables: Mapping[str, str], run_id: str) -> _Announcement:
    text = variables[ANNOUNCEMENT_VARIABLE]
    try:
        values = read_announcement(text) if len(text) <= _ANNOUNCEMENT_LIMIT else None
    except Exception:  # base64, zlib, UTF-8 and JSON each have their own
        values = None
    announced = _read(_Announcement, values, ANNOUNCEMENT_VARIABLE, run_id)
    if not announced.recipe:
        raise UserError(f"run: the recipe of {run_id} is too long to travel with a run; {_ELSEWHERE}")
    return announced


def _recipe(announced: _Announcement, variables: Mapping[str, str], run_id: str) -> Recipe:
    """The run's recipe, if this installation reads it as the one that submitted it."""
    there = announced.tags.get("modelmill.code_version", "of another version")
    fix = f"it was submitted by modelmill {there}, this is {code.package_version()}: take its code, or {_ELSEWHERE}"
    try:
        recipe = catalogs.current().parse(announced.recipe)
    except UserError as error:
        raise UserError(f"run: the recipe of {run_id} is not one of this installation ({error}); {fix}") from None
    recorded = {variables.get(RECIPE_VARIABLE, ""), announced.tags.get("modelmill.recipe_hash", "")}
    if recorded != {recipe.hash}:
        shown = " and ".join(sorted(recorded))
        raise UserError(f"run: the recipe of {run_id} has the hash {shown} at KFP and {recipe.hash} here; {fix}")
    return recipe


def _parameters(found: Any, compiled: Mapping[str, Any]) -> dict[str, Any]:
    """What the steps of a run received: its own parameters, else those of its pipeline version."""
    declared = _at(compiled, "pipeline_spec", "root", "inputDefinitions", "parameters")
    defaults = {name: _at(each).get("defaultValue") for name, each in declared.items()}
    own = found.runtime_config.parameters if found.runtime_config else None
    return {**defaults, **(own or {})}


def _sections(recipe: Recipe, parameters: Mapping[str, Any], run_id: str) -> dict[str, str]:
    """Sections as the run had them, with the code and outside state of that time, if they are of its recipe."""
    steps = {step.name: step for step in recipe.steps()}
    if differing := sorted(steps.keys() ^ parameters.keys()):
        names = ", ".join(differing)
        raise UserError(f"run: the steps of {run_id} are not those of {recipe.pipeline} here ({names}); {_ELSEWHERE}")
    for name, step in steps.items():
        record = _read(_Section, str(parameters[name]), f"parameter {name}", run_id)
        if record.step != name or record.config != json.loads(step.config.model_dump_json()):
            raise UserError(
                f"run: parameter {name} of {run_id} is not what its recipe says, so it was changed at KFP; start anew"
                " with `modelmill run`"
            )
    return {name: str(parameters[name]) for name in steps}


def _check_places(recipe: Recipe, profile: Profile, places: Mapping[str, _StepPlace], run_id: str) -> None:
    """Refuse a profile under which nothing would be found again: outputs are made anew and side effects repeated."""
    problems: dict[str, None] = {}  # a set that keeps the order
    for step in recipe.steps():
        if step.name not in places:
            raise UserError(f"run: {run_id} has no pod for its step {step.name}; {_ELSEWHERE}")
        has = _planned(step, profile)
        had = _recorded(step, places[step.name], profile, run_id)
        for name in sorted(had.keys() | has.keys()):
            if had.get(name) != has.get(name):
                problems[f"{name} was {_shown(had.get(name))} and is {_shown(has.get(name))}"] = None
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        shown = "; ".join([*list(problems)[:_SHOWN], *more])
        raise UserError(f"--profile: {profile.name} is not what {run_id} ran under, name one that is: {shown}")


def _planned(step: PlannedStep, profile: Profile) -> dict[str, Any]:
    """Parameters of a profile that decide where a step's outputs, checkpoints and training job are."""
    options = declared_options(step.function)
    assert profile.home is not None  # checked with the profile
    return {
        f"images.{_family(step, profile)}": profile.image(_family(step, profile)),
        "home.mount": profile.home.mount,
        "home.claim": profile.home.claim,
        "store": profile.store or "",
        **_flat(launcher_record(profile) if options.launches else None),
    }


def _recorded(step: PlannedStep, place: _StepPlace, profile: Profile, run_id: str) -> dict[str, Any]:
    """The same parameters as the step's pod had them."""
    variables = place.variables()
    mount, launcher = variables.get(HOME_VARIABLE, ""), variables.get(LAUNCHER_VARIABLE)
    record = _read(_Launcher, launcher, LAUNCHER_VARIABLE, run_id).model_dump() if launcher else None
    return {
        f"images.{_family(step, profile)}": place.container.image,
        "home.mount": mount,
        "home.claim": next((each.claim for each in place.pod.mounts if each.path == mount), ""),
        "store": variables.get(STORE_VARIABLE, ""),
        **_flat(record),
    }


def _family(step: PlannedStep, profile: Profile) -> ImageFamily:
    options = declared_options(step.function)
    return profile.pod(device=options.device, launches=options.launches).image


def _flat(launcher: Mapping[str, Any] | None) -> dict[str, Any]:
    """A launcher's record with the names a profile has for its parameters."""
    if launcher is None:
        return {}
    section = str(launcher["launcher"]).partition(":")[0].rpartition(".")[2]
    return {"launcher": section, **{f"{section}.{name}": value for name, value in launcher["config"].items()}}


def _shown(value: Any) -> str:
    text = "not set" if value in (None, "") else str(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
