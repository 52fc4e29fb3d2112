"""Profiles: everything a cluster adds to a run. A recipe says what, a profile says where; neither names the other.

A profile is one YAML file below `profiles/`, or in the folder `MODELMILL_PROFILES` names, and may extend another:

    extends: eks-p5
    name: team-p5
    images: {registry: 123456789012.dkr.ecr.eu-west-1.amazonaws.com}
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from modelmill.components.core.recipe import Section
from modelmill.components.launchers.sagemaker_config import SageMakerConfig
from modelmill.components.launchers.trainjob_config import Toleration, TrainJobConfig

LauncherName = Literal["local", "trainjob", "sagemaker"]


class ImagesConfig(Section):
    """Images by family; a digest makes the tag immaterial and enters the key of every output."""

    registry: str = Field(default="", description="Registry and path before the image's name.")
    cpu: str = Field(default="", description="Reference of the cpu image; empty: registry, name and package version.")
    gpu: str = Field(default="", description="Reference of the gpu image.")
    neuron: str = Field(default="", description="Reference of the neuron image.")


class VolumeConfig(Section):
    """A persistent volume claim in every pod of a run."""

    claim: str = Field(description="Name of the claim.")
    mount: str = Field(description="Absolute path, the same in every pod.")
    read_only: bool = Field(default=False, description="Whether pods may only read it.")


class StepResources(Section):
    """What the pod of one step asks for; requests equal limits, so that nothing is evicted for what it never asked."""

    image: Literal["cpu", "gpu", "neuron"] = Field(default="cpu", description="Image family of the step.")
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
    volumes: list[VolumeConfig] = Field(default=[], description="Further volumes, such as one with data.")
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
    step_timeout_seconds: PositiveInt | None = Field(default=None, description="Longest life of a step's pod.")
    retries: NonNegativeInt = Field(default=1, description="How often a failed step is tried again.")

    @model_validator(mode="after")
    def _launcher_has_its_place(self) -> Self:
        if self.launcher != "local" and getattr(self, self.launcher) is None:
            raise ValueError(f"{self.launcher}: missing; launcher {self.launcher} needs this section")
        return self
