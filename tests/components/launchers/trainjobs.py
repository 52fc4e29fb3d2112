"""What tests of the TrainJob launcher share: a job, its place, and a cluster on the fake API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelmill.components.launchers.kubernetes_client import Cluster
from modelmill.components.launchers.trainjob import TrainJobLauncher
from modelmill.components.launchers.trainjob_config import TrainJobConfig
from modelmill.components.launchers.trainjob_render import ATTEMPT_ANNOTATION, SCRATCH_ANNOTATION
from modelmill.components.training.config import TrainingConfig
from modelmill.components.training.launch import TrainingJob
from tests.fakes.kubernetes_api import KubernetesApi
from tests.fakes.kubernetes_trainer import Trainer

NAMESPACE = "modelmill"
KEY = "0123456789abcdef01234567"
IMAGE = "registry.example/modelmill-cpu@sha256:" + "0" * 64


def training(**changes: Any) -> TrainingConfig:
    parallel = changes.pop("parallel", {"nodes": 2, "processes_per_node": 1})
    base = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "parallel": parallel}
    return TrainingConfig.model_validate({**base, **changes})


def place(mount: Path | str, **changes: Any) -> TrainJobConfig:
    base = {
        "namespace": NAMESPACE,
        "runtime": "torch",
        "image": IMAGE,
        "service_account": "modelmill-trainer",
        "cpu": "2",
        "memory": "4Gi",
        "claim": "modelmill-home",
        "mount": str(mount),
        "queue": "training",
    }
    return TrainJobConfig.model_validate({**base, **changes})


def job(home: Path, step: str = "pretrain", key: str = KEY, **changes: Any) -> TrainingJob:
    scratch = home / "store" / step / f"{key}.partial"
    (scratch / "data").mkdir(parents=True, exist_ok=True)
    model = scratch / "data/model"
    spec = {"output": str(scratch / "data")}
    return TrainingJob("modelmill.components.llama.pretrain", spec, training(**changes), scratch, (model,))


def launcher(
    api: KubernetesApi, home: Path, client: Any = None, place_changes: dict[str, Any] | None = None, **options: Any
) -> TrainJobLauncher:
    """A launcher that looks often, on the fake API."""

    def connect(namespace: str) -> Cluster:
        return Cluster(namespace, client or api.client(), patience=20, pause=0.002)

    speed = {"interval": 0.02, "visibility": 2.0, "ending": 5.0, **options}
    return TrainJobLauncher(place(**{"mount": home, **(place_changes or {})}), connect, **speed)


class Script:
    """Does the next deed whenever the launcher watches."""

    def __init__(self, api: KubernetesApi, *deeds: Callable[[str], Any]) -> None:
        self.api, self.trainer, self.deeds = api, Trainer(api), list(deeds)
        api.longest_watch = 0.01
        api.before_request = self._before

    def _before(self, method: str, path: str) -> None:
        names = self.trainer.names()
        if method == "GET" and "watch=True" in path and "/trainjobs" in path and self.deeds and names:
            self.deeds.pop(0)(names[0])


def finish_work(api: KubernetesApi, name: str) -> None:
    """What rank 0 does last: the result record, which says which attempt made it."""
    meta = api.store.find(("trainer.kubeflow.org", "trainjobs", NAMESPACE, name))["metadata"]["annotations"]
    scratch = Path(meta[SCRATCH_ANNOTATION])
    (scratch / "data/model").mkdir(parents=True, exist_ok=True)
    (scratch / "data/model/weights").write_text(meta[ATTEMPT_ANNOTATION])
    result = {"counts": {"steps": 4}, "metrics": {"loss": 1.5}, "metadata": {"made_by": meta[ATTEMPT_ANNOTATION]}}
    (scratch / "result.json").write_text(json.dumps(result))
