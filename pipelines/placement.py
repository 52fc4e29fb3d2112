"""Where each step of a recipe would run under a profile: image, resources, nodes, and why not. Touches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.launchers.trainjob_config import TrainJobConfig
from modelmill.components.training.config import TrainingConfig
from modelmill.pipelines.plan import declared_options
from modelmill.pipelines.platform import ImageFamily, Profile


@dataclass(frozen=True)
class Place:
    """Pods of one kind that a step runs in.

    Attributes:
        step: name of the step.
        kind: `pod`, or the launcher of its training processes.
        image: reference of the image, the family while the profile names no registry.
        count: pods at a time.
        asks: resource -> amount that each asks for.
        nodes: labels of the nodes it may run on.
        queue: Kueue queue in which it waits, if any.
    """

    step: str
    kind: str
    image: str
    count: int
    asks: dict[str, str]
    nodes: dict[str, str] = field(default_factory=dict)
    queue: str | None = None


def places(recipe: Recipe, profile: Profile) -> list[Place]:
    """The pods of every step, in the order the steps run."""
    return [place for step in recipe.steps() for place in _places(step, profile)]


def problems(recipe: Recipe, profile: Profile) -> list[str]:
    """What keeps a profile from running a recipe, one line each; empty when it may be submitted."""
    from modelmill.pipelines.launch.platform_tasks import check_layouts

    found = []
    for check in (profile.check_submittable, lambda: check_layouts(recipe, profile)):
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def trainings(config: Any) -> Iterator[TrainingConfig]:
    """The training sections of a step's config, wherever they are in it, as a search holds those of its trials."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, TrainingConfig):
            yield value
        elif isinstance(value, BaseModel):
            yield from trainings(value)


def _places(step: PlannedStep, profile: Profile) -> Iterator[Place]:
    options = declared_options(step.function)
    pod = profile.pod(device=options.device, launches=options.launches)
    asks = {"cpu": pod.cpu, "memory": pod.memory}
    if pod.accelerator and pod.accelerator_count:
        asks[pod.accelerator] = str(pod.accelerator_count)
    yield Place(step.name, "pod", _image(profile, pod.image), 1, asks, pod.node_selector)
    nodes = max((training.parallel.nodes for training in trainings(step.config)), default=1)
    if options.launches and profile.launcher == "trainjob" and profile.trainjob:
        yield _job(step.name, profile.trainjob, nodes)
    elif options.launches and profile.launcher == "sagemaker" and profile.sagemaker:
        instance = {profile.sagemaker.instance_type: "1"}
        yield Place(step.name, "sagemaker", profile.sagemaker.image, nodes, instance)


def _job(step: str, job: TrainJobConfig, nodes: int) -> Place:
    asks = {"cpu": job.cpu, "memory": job.memory}
    if job.accelerator and job.devices_per_node:
        asks[job.accelerator] = str(job.devices_per_node)
    if job.efa_per_node:
        asks["vpc.amazonaws.com/efa"] = str(job.efa_per_node)
    image = job.image or f"({job.runtime})"
    return Place(step, "trainjob", image, nodes, asks, job.node_selector, job.queue)


def _image(profile: Profile, family: ImageFamily) -> str:
    return profile.images.reference(family) or f"({family})"
