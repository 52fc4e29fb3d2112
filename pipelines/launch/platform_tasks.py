"""A profile applied to a pipeline: what every task needs to run as a pod, set after the DAG is built.

The pipelines know nothing of this. Their function is called once more inside a new KFP component, and each task it
made gets its image, resources, volumes, secrets and variables from the profile and from the options of its step.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from modelmill.components.core import code
from modelmill.components.core.errors import UserError
from modelmill.components.core.events import RUN_ID_VARIABLE
from modelmill.components.core.home import HOME_VARIABLE
from modelmill.components.core.pod import ANNOUNCEMENT_VARIABLE, announcement
from modelmill.components.core.pod_security import USER
from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.core.step import (
    FINISHED_VARIABLE,
    FRESH_VARIABLE,
    IMAGE_VARIABLE,
    RECIPE_VARIABLE,
    StepOptions,
    section,
)
from modelmill.components.core.store import STORE_VARIABLE
from modelmill.components.training.launch import LAUNCHER_VARIABLE, current_launcher
from modelmill.pipelines.placement import trainings
from modelmill.pipelines.plan import declared_options
from modelmill.pipelines.platform import Profile, StepResources

STEP_LABEL = "modelmill.dev/step"
RUN_LABEL = "pipeline/runid"  # set by KFP on every pod of a run
CLOSING_TASK = "close-run"
_LAUNCHERS = {
    "trainjob": "modelmill.components.launchers.trainjob:TrainJobLauncher",
    "sagemaker": "modelmill.components.launchers.sagemaker:SageMakerLauncher",
}
_ANNOUNCEMENT_LIMIT = 16 * 1024  # bytes; every task of the workflow carries it, and etcd takes 1.5 MB in all


@dataclass(frozen=True)
class Placement:
    """A run of a recipe somewhere.

    Attributes:
        reference: how the user named the recipe.
        finished: steps that finished in the run this one resumes; they are not repeated, side effects included.
        fresh: compute every step again.
    """

    recipe: Recipe
    profile: Profile
    reference: str = ""
    finished: tuple[str, ...] = ()
    fresh: bool = False


def cluster_sections(recipe: Recipe) -> dict[str, str]:
    """Section of every step for a run on a cluster: outside state is looked at by the step, code is its sources."""
    return {step.name: _section(step) for step in recipe.steps()}


def _section(step: PlannedStep) -> str:
    outside = callable(getattr(step.config, "fingerprint", None))
    return section(step.name, step.config, step.function, None if outside else "", elsewhere=True)


def check_admissible(recipe: Recipe, profile: Profile) -> None:
    """Refuse a recipe that a profile cannot run, before anything is sent.

    Raises:
        UserError: one line naming the parameter, its value and the fix.
    """
    profile.check_submittable()
    check_layouts(recipe, profile)


def check_layouts(recipe: Recipe, profile: Profile) -> None:
    """Refuse layouts of training processes that a profile's devices cannot hold.

    Raises:
        UserError: one line naming the parameter, its value and the fix.
    """
    for step in recipe.steps():
        if not declared_options(step.function).launches:
            continue
        for training in trainings(step.config):
            try:
                if profile.launcher == "local":
                    _check_pod(training, profile)
                else:
                    launcher_of(profile).check(training)
            except UserError as error:
                raise UserError(f"{error} (step {step.name}, profile {profile.name})") from None


def _check_pod(training: Any, profile: Profile) -> None:
    """What one pod can train: a single node, a process a device."""
    parallel, place = training.parallel, profile.device_step or profile.step
    if parallel.nodes > 1:
        raise UserError(
            f"training.parallel.nodes: {parallel.nodes} needs a profile with launcher trainjob or sagemaker; use 1"
        )
    wanted = training.accelerator
    held = {"gpu": "cuda", "neuron": "neuron", "cpu": "cpu"}[place.image]
    if wanted not in ("auto", held):
        raise UserError(f"training.accelerator: {wanted!r} is not what the steps run on ({held}); use auto or {held}")
    if place.accelerator and parallel.processes_per_node > place.accelerator_count:
        raise UserError(
            f"training.parallel.processes_per_node: {parallel.processes_per_node} is more than the"
            f" {place.accelerator_count} devices of a step (device_step.accelerator_count)"
        )


def launcher_record(profile: Profile) -> dict[str, Any] | None:
    """What a launching step reads from its environment, or None when it trains in its own pod."""
    if profile.launcher == "local":
        return None
    config = profile.trainjob if profile.launcher == "trainjob" else profile.sagemaker
    assert config is not None  # checked with the profile
    return {"launcher": _LAUNCHERS[profile.launcher], "config": config.model_dump(mode="json")}


def launcher_of(profile: Profile) -> Any:
    """The launcher of a profile, as a step would make it."""
    record = launcher_record(profile)
    return current_launcher(json.dumps(record) if record else "")


def placed(dag: Any, placement: Placement) -> Any:
    """The same pipeline with the profile on every task; a KFP component that can be compiled.

    A pipeline without an exit handler gets one that ends its run in MLflow.

    Args:
        dag: a function decorated with `dsl.pipeline`.
        placement: recipe, profile and what is known of earlier runs.
    """
    from kfp import dsl
    from kfp.dsl.pipeline_context import Pipeline

    original: Callable[..., Any] = dag.pipeline_func
    fresh = _has_exit_handler(dag)

    @functools.wraps(original)
    def function(*arguments: Any, **named: Any) -> Any:
        if fresh:
            outputs = original(*arguments, **named)
        else:
            from modelmill.pipelines.launch.closing import close_run

            with dsl.ExitHandler(close_run(), name="run"):
                outputs = original(*arguments, **named)
        _place_tasks(Pipeline.get_default_pipeline().tasks, placement)
        return outputs

    function.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    description = dag.component_spec.description
    return dsl.pipeline(
        function, name=dag.component_spec.name, description=description, pipeline_config=dag.pipeline_config
    )


def _has_exit_handler(dag: Any) -> bool:
    tasks = dag.pipeline_spec.root.dag.tasks
    return any("taskFinalStatus" in str(task) or "task_final_status" in str(task) for task in tasks.values())


def _place_tasks(tasks: Mapping[str, Any], placement: Placement) -> None:
    known = {step.name.replace("_", "-"): step for step in placement.recipe.steps()}
    common = _environment(placement)
    for name, task in tasks.items():
        if task.container_spec is None:  # an importer has no pod of its own
            continue
        step = known.get(name)
        options = declared_options(step.function) if step else StepOptions(reuse=False)
        _place(task, step.name if step else name, options, placement, common)


def _environment(placement: Placement) -> dict[str, str]:
    """Variables of every pod of a run."""
    profile, recipe = placement.profile, placement.recipe
    assert profile.home is not None  # checked with the profile
    own = {
        HOME_VARIABLE: profile.home.mount,
        RECIPE_VARIABLE: recipe.hash,
        ANNOUNCEMENT_VARIABLE: _announcement(placement),
        FINISHED_VARIABLE: ",".join(placement.finished),
        FRESH_VARIABLE: "1" if placement.fresh else "",
        "MLFLOW_TRACKING_URI": profile.tracking.uri,
        STORE_VARIABLE: profile.store or "",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
    }
    return {name: value for name, value in {**own, **profile.environment}.items() if value}


def _announcement(placement: Placement) -> str:
    recipe = placement.recipe
    tags = {
        "mlflow.note.content": recipe.description,
        "modelmill.recipe": placement.reference,
        "modelmill.recipe_hash": recipe.hash,
        "modelmill.profile": placement.profile.name,
        "modelmill.code_version": code.package_version(),
    }
    record = {
        "name": recipe.name,
        "experiment": recipe.tracking.experiment,
        "tags": {name: value for name, value in tags.items() if value},
        "recipe": recipe.model_dump(mode="json"),
    }
    text = announcement(record)
    # A recipe that long stays out of the parent run; each step still reports its own section.
    return text if len(text) <= _ANNOUNCEMENT_LIMIT else announcement({**record, "recipe": {}})


def _place(task: Any, step: str, options: StepOptions, placement: Placement, common: Mapping[str, str]) -> None:
    from kfp import kubernetes

    profile = placement.profile
    resources = profile.pod(device=options.device, launches=options.launches)
    image = profile.image(resources.image)
    task.set_container_image(image)
    task.set_caching_options(False)  # ours knows the image, the code and the state outside; KFP's does not
    variables = {**common, IMAGE_VARIABLE: image}
    record = launcher_record(profile) if options.launches else None
    if record:
        variables[LAUNCHER_VARIABLE] = json.dumps(record, sort_keys=True)
    for name, value in sorted(variables.items()):
        task.set_env_variable(name, value)
    kubernetes.use_field_path_as_env(task, RUN_ID_VARIABLE, f"metadata.labels['{RUN_LABEL}']")
    _secrets(task, profile)
    _resources(task, resources)
    kubernetes.add_pod_label(task, STEP_LABEL, step)
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.set_image_pull_policy(task, profile.image_pull_policy)
    for volume in [profile.home, *profile.volumes]:
        assert volume is not None
        kubernetes.mount_pvc(task, pvc_name=volume.claim, mount_path=volume.mount)
    if profile.step_timeout_seconds:
        kubernetes.set_timeout(task, profile.step_timeout_seconds)
    if profile.retries and options.reuse:  # what a failed side effect left behind is for people to judge
        task.set_retry(profile.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration="600s")


def _secrets(task: Any, profile: Profile) -> None:
    from kfp import kubernetes

    wanted: dict[str, dict[str, str]] = {}
    if profile.tracking.secret:
        names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
        wanted[profile.tracking.secret] = {name: name for name in names}
    for variable, reference in profile.secrets.items():
        secret, _, key = reference.partition("/")
        wanted.setdefault(secret, {})[key] = variable
    for secret, keys in wanted.items():
        kubernetes.use_secret_as_env(task, secret_name=secret, secret_key_to_env=keys)


def _resources(task: Any, resources: StepResources) -> None:
    from kfp import kubernetes

    task.set_cpu_request(resources.cpu).set_cpu_limit(resources.cpu)
    task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if resources.accelerator and resources.accelerator_count:
        task.set_accelerator_type(resources.accelerator).set_accelerator_limit(resources.accelerator_count)
    if resources.shared_memory:
        kubernetes.empty_dir_mount(
            task,
            volume_name="shared-memory",
            mount_path="/dev/shm",
            medium="Memory",
            size_limit=resources.shared_memory,
        )
    for key, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for each in resources.tolerations:
        kubernetes.add_toleration(task, key=each.key, operator=each.operator, value=each.value, effect=each.effect)


def side_effects(recipe: Recipe, finished: Collection[str]) -> tuple[str, ...]:
    """Those of the finished steps that a resumed run must not repeat."""
    steps = [step for step in recipe.steps() if step.name in finished]
    return tuple(step.name for step in steps if not declared_options(step.function).reuse)
