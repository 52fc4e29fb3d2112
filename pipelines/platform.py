"""Profiles: everything a cluster adds to a run. A recipe says what, a profile says where; neither names the other.

A profile is one YAML file below `profiles/`, or in the folder `MODELMILL_PROFILES` names, and may extend another:

    extends: eks-p5
    name: team-p5
    images: {registry: 123456789012.dkr.ecr.eu-west-1.amazonaws.com}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError, model_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.images import image
from modelmill.components.core.presets import Presets, check
from modelmill.components.core.recipe import Section
from modelmill.components.launchers.sagemaker_config import SageMakerConfig
from modelmill.components.launchers.trainjob_config import Toleration, TrainJobConfig

LauncherName = Literal["local", "trainjob", "sagemaker"]
ImageFamily = Literal["cpu", "gpu", "neuron"]
PROFILES_VARIABLE = "MODELMILL_PROFILES"  # folder with the profiles of a team; searched before the shipped ones
PROFILES = Path(__file__).resolve().parent / "profiles"


class ImagesConfig(Section):
    """Images by family; a digest makes the tag immaterial and enters the key of every output."""

    registry: str = Field(default="", description="Registry and path before the image's name.")
    cpu: str = Field(default="", description="Reference of the cpu image; empty: registry, name and package version.")
    gpu: str = Field(default="", description="Reference of the gpu image.")
    neuron: str = Field(default="", description="Reference of the neuron image.")

    def reference(self, family: ImageFamily) -> str:
        """The image of a family: its own, else registry, name and package version; empty without a registry."""
        return getattr(self, family) or (image(family, self.registry) if self.registry else "")


class VolumeConfig(Section):
    """A persistent volume claim in the pods of a run's steps."""

    claim: str = Field(description="Name of the claim.")
    mount: str = Field(description="Absolute path, the same in every pod.")
    read_only: bool = Field(default=False, description="Whether the claim itself can only be read (ReadOnlyMany).")


class StepResources(Section):
    """What the pod of one step asks for; requests equal limits, so that nothing is evicted for what it never asked."""

    image: ImageFamily = Field(default="cpu", description="Image family of the step.")
    cpu: str = Field(default="2", description="CPUs.")
    memory: str = Field(default="8Gi", description="Memory.")
    accelerator: str | None = Field(default=None, description="Resource name of a device, such as nvidia.com/gpu.")
    accelerator_count: NonNegativeInt = Field(default=0, description="Devices.")
    shared_memory: str | None = Field(default=None, description="Size of /dev/shm; null: the container's own 64 MiB.")
    node_selector: dict[str, str] = Field(default={}, description="Labels of the nodes.")
    tolerations: list[Toleration] = Field(default=[], description="Taints of the nodes.")


class TrackingServer(Section):
    """The MLflow server that the pods of a run report to."""

    uri: str = Field(default="", description="Address inside the cluster; empty: the embedded store in the home.")
    ui: str = Field(default="", description="Address for people, shown with a run.")
    secret: str | None = Field(default=None, description="Secret with MLFLOW_TRACKING_USERNAME and _PASSWORD.")


class KfpConfig(Section):
    """The Kubeflow Pipelines endpoint and how to log in."""

    endpoint: str = Field(default="", description="API address; empty: $KF_PIPELINES_ENDPOINT.")
    ui: str = Field(default="", description="Address for people; empty: the endpoint.")
    auth: Literal["none", "token", "service-account", "cookies"] = Field(
        default="none",
        description="token: $KF_PIPELINES_TOKEN; service-account: a projected token; cookies: $KF_PIPELINES_COOKIES.",
    )
    token_path: str = Field(
        default="/var/run/secrets/kubeflow/pipelines/token", description="Projected token of a service account."
    )
    ca_certificate: str | None = Field(default=None, description="File with the endpoint's certificate authority.")


class Profile(Section):
    """Where runs happen: see the module."""

    name: str = Field(description="Name of the profile.")
    description: str = Field(default="", description="What it is for, in one sentence.")
    where: Literal["laptop", "cluster"] = Field(description="laptop: this machine; cluster: Kubeflow Pipelines.")
    namespace: str = Field(default="modelmill", description="Kubernetes namespace of runs and training jobs.")
    service_account: str = Field(default="modelmill-runner", description="Service account of the steps' pods.")
    images: ImagesConfig = ImagesConfig()
    home: VolumeConfig | None = Field(default=None, description="Volume of MODELMILL_HOME, shared by all pods.")
    store: str | None = Field(
        default=None, description="s3:// prefix for the outputs of steps; null keeps them in the home."
    )
    volumes: list[VolumeConfig] = Field(
        default=[],
        description="Further volumes of the steps, as one with data; training jobs mount the home alone.",
    )
    step: StepResources = Field(default=StepResources(), description="Steps that need no device.")
    device_step: StepResources | None = Field(
        default=None, description="Steps that run a model on one device; null: like every other step."
    )
    launcher: LauncherName = Field(
        default="local", description="Where training processes run; local: in the pod of the step."
    )
    trainjob: TrainJobConfig | None = Field(default=None, description="With launcher trainjob.")
    sagemaker: SageMakerConfig | None = Field(default=None, description="With launcher sagemaker.")
    tracking: TrackingServer = TrackingServer()
    kfp: KfpConfig = KfpConfig()
    environment: dict[str, str] = Field(default={}, description="Variables of every step.")
    secrets: dict[str, str] = Field(
        default={}, description="Variable of every step -> `secret/key` that holds its value, such as HF_TOKEN."
    )
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        default="IfNotPresent", description="When a node pulls an image it has; digests never change."
    )
    step_timeout_seconds: PositiveInt | None = Field(
        default=None, description="Longest life of a step's pod; one that launches a training job waits for it."
    )
    retries: NonNegativeInt = Field(default=1, description="How often a failed step is tried again.")
    device: str | None = Field(
        default=None, description="Device that estimates of memory and time assume, such as h100; null: by the recipe."
    )
    price_per_hour: NonNegativeFloat | None = Field(
        default=None, description="Price of one node of a training job; null shows no cost."
    )

    @model_validator(mode="before")
    @classmethod
    def _trainjob_belongs_to_the_run(cls, values: Any) -> Any:
        """What a training job shares with the run is said once: namespace, account, volume, image."""
        job = values.get("trainjob") if isinstance(values, Mapping) else None
        if not isinstance(job, Mapping):
            return values
        home = values.get("home")
        shared = {"claim": ""}  # without a home the profile is refused as a whole
        shared |= {name: home[name] for name in ("claim", "mount") if isinstance(home, Mapping) and name in home}
        for name in ("namespace", "service_account"):
            shared[name] = values.get(name, cls.model_fields[name].default)
        try:
            images = ImagesConfig.model_validate(values.get("images") or {})
        except ValidationError:
            images = ImagesConfig()  # reported with its place when the section itself is checked
        shared["image"] = images.reference(_family(job.get("accelerator")))
        own = {name: value for name, value in job.items() if value or name != "image"}
        return {**values, "trainjob": {**shared, **own}}

    @model_validator(mode="after")
    def _launcher_has_its_place(self) -> Self:
        if self.launcher != "local" and getattr(self, self.launcher) is None:
            raise ValueError(f"{self.launcher}: missing; launcher {self.launcher} needs this section")
        return self

    @model_validator(mode="after")
    def _secrets_have_keys(self) -> Self:
        for variable, reference in self.secrets.items():
            if len(reference.split("/")) != 2 or not all(reference.split("/")):
                raise ValueError(f"secrets.{variable}: {reference!r} is not secret/key; name both")
        return self

    @model_validator(mode="after")
    def _cluster_has_a_home(self) -> Self:
        if self.where == "cluster" and self.home is None:
            raise ValueError(
                "home: missing; the pods of a run on a cluster share one volume, name its claim and mount"
            )
        job, longest = self.trainjob, self.step_timeout_seconds
        if self.launcher == "trainjob" and job and longest and (job.deadline_seconds or longest + 1) > longest:
            raise ValueError(
                f"step_timeout_seconds: {longest} is less than trainjob.deadline_seconds {job.deadline_seconds};"
                " the step that launches a training job waits for its end, so raise it or leave it out"
            )
        return self

    def image(self, family: ImageFamily) -> str:
        """Reference of an image family.

        Raises:
            UserError: the profile names no registry.
        """
        reference = self.images.reference(family)
        if not reference:
            raise UserError(f"images.registry: {self._empty()}")
        return reference

    def pod(self, *, device: bool, launches: bool) -> StepResources:
        """What the pod of a step asks for.

        Args:
            device: the step runs a model.
            launches: it starts a training job, which runs in its own pod unless a launcher puts it elsewhere.
        """
        needs_device = device or (launches and self.launcher == "local")
        return self.device_step if needs_device and self.device_step else self.step

    def check_submittable(self) -> None:
        """Refuse a run on a cluster before anything is sent, when the profile leaves out what only a team knows.

        Raises:
            UserError: the empty parameters and where to set them.
        """
        if self.where != "cluster":
            raise UserError(f"profile: {self.name} is for this machine; choose one of a cluster")
        families = {self.step.image, *([self.device_step.image] if self.device_step else [])}
        missing = [] if all(self.images.reference(family) for family in families) else ["images.registry"]
        if self.launcher == "trainjob" and self.trainjob is not None and not self.trainjob.image:
            missing = missing or ["trainjob.image"]
        if missing:
            raise UserError("; ".join(f"{name}: {self._empty()}" for name in missing))

    def _empty(self) -> str:
        return f"empty; set it in a profile of your own that extends {self.name}"


def profile_names() -> list[str]:
    """Names of the profiles of the team and of those that ship.

    Raises:
        UserError: `MODELMILL_PROFILES` names no folder.
    """
    return _presets().names()


def load_profile(reference: str, overrides: Sequence[str] = ()) -> Profile:
    """Read, extend, override and check a profile.

    Args:
        reference: a name that `profile_names` has, or the path of a YAML file.
        overrides: `dotted.key=value`, the value read as YAML.

    Raises:
        UserError: one line naming the profile or the parameter, its value and the fix.
    """
    return check(Profile, _presets().read(reference, overrides), "profile")


def _presets() -> Presets:
    own = os.environ.get(PROFILES_VARIABLE)
    if own and not Path(own).is_dir():
        raise UserError(f"{PROFILES_VARIABLE}: {own} is not a folder; name the one with your profiles, or unset it")
    folders = (Path(own), PROFILES) if own else (PROFILES,)
    return Presets("profile", folders, "--profile-set", "images.registry=HOST/PATH", "modelmill list")


def _family(accelerator: Any) -> ImageFamily:
    """Image family of training processes on a device, by its resource name."""
    name = str(accelerator or "")
    return "neuron" if "neuron" in name else "gpu" if name else "cpu"
