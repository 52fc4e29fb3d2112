"""How a training job becomes a Kubeflow Trainer TrainJob: the cluster's part, from the profile of the run."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from modelmill.components.core.recipe import Section


class Toleration(Section):
    """A taint that pods may run on."""

    key: str = Field(description="Key of the taint.")
    operator: str = Field(default="Exists", description="Exists, or Equal with a value.")
    value: str | None = Field(default=None, description="Value of the taint, with Equal.")
    effect: str | None = Field(default="NoSchedule", description="Effect of the taint; null tolerates every effect.")


class TrainJobConfig(Section):
    """What one node of a training job asks of the cluster, and where its job belongs."""

    namespace: str = Field(description="Namespace of the TrainJob.")
    runtime: str = Field(description="Name of the ClusterTrainingRuntime.")
    image: str = Field(description="Image of the training processes, by digest.")
    service_account: str = Field(description="Service account of the training pods.")
    accelerator: str | None = Field(
        default=None, description="Resource name of the devices, such as nvidia.com/gpu; null trains on the CPU."
    )
    devices_per_node: NonNegativeInt = Field(default=0, description="Devices asked of a node.")
    processes_per_device: PositiveInt = Field(
        default=1, description="Training processes a device holds: 1 for a GPU, 2 for trn1, 4 for trn2 (LNC=2)."
    )
    efa_per_node: NonNegativeInt = Field(default=0, description="EFA interfaces asked of a node.")
    cpu: str = Field(description="CPUs asked of a node, such as '90'.")
    memory: str = Field(description="Memory asked of a node, such as 400Gi; shared memory counts against it.")
    shared_memory: str = Field(default="8Gi", description="Size of /dev/shm.")
    claim: str = Field(description="Persistent volume claim that holds MODELMILL_HOME, shared by all pods.")
    mount: str = Field(default="/mnt/modelmill", description="Where it is mounted; the same path in every pod.")
    node_selector: dict[str, str] = Field(default={}, description="Labels of the nodes.")
    tolerations: list[Toleration] = Field(default=[], description="Taints of the nodes.")
    queue: str | None = Field(default=None, description="Kueue LocalQueue; null starts without a queue.")
    priority_class: str | None = Field(default=None, description="Kueue WorkloadPriorityClass of the job.")
    required_topology: str | None = Field(
        default=None, description="Kueue topology level that holds all nodes of a job, such as a network node layer."
    )
    environment: dict[str, str] = Field(default={}, description="Variables of the training processes.")
    secrets: dict[str, str] = Field(
        default={}, description="Variable of the training processes -> `secret/key` that holds its value."
    )
    grace_seconds: PositiveInt = Field(
        default=300, description="Time between SIGTERM and SIGKILL: at least one blocking checkpoint."
    )
    deadline_seconds: PositiveInt | None = Field(
        default=None, description="Longest life of the job, waiting in the queue included; null has no end."
    )
