"""Pretraining through a rendered TrainJob with real processes: two nodes, one of which is killed in the middle."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core.weights import weights_digest
from modelmill.components.llama.pretrain import pretrain
from modelmill.components.training.launch import Launcher, LocalLauncher
from tests.components.launchers.trainjobs import KEY, launcher
from tests.components.training.samples import make_tokenizer, make_tokens, pretrain_config
from tests.fakes.kubernetes_api import KubernetesApi
from tests.fakes.kubernetes_trainer import RUNTIME, Kubelet

ROOT = Path(__file__).resolve().parents[3]
LONG: dict[str, Any] = {"steps": 240, "log_every": 20, "validate_every": 120, "checkpoint_every": 40}
PLACE = {"environment": {"GLOO_SOCKET_IFNAME": "lo"}, "queue": None}


@pytest.fixture
def kubelet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubelet]:
    monkeypatch.setenv("MODELMILL_RUN_ID", "run-1")
    image = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    with KubernetesApi() as api:
        api.store.create(RUNTIME)
        with Kubelet(api, ROOT, environment=image) as found:
            yield found
        assert api.store.rejected == []


def train(home: Path, place: Launcher, nodes: int) -> Path:
    """Pretrain in a home; returns the model's folder."""
    tokens, tokenizer = home.parent / "tokens", home.parent / "tokenizer"
    inputs = {
        "tokens": make_tokens(tokens / home.name),
        "tokenizer": make_tokenizer(tokenizer / home.name),
    }
    output = home / "store/pretrain" / f"{KEY}.partial" / "data"
    output.mkdir(parents=True)
    config = pretrain_config(**LONG, parallel={"nodes": nodes, "processes_per_node": 2 // nodes})
    result = pretrain(config, output, launcher=place, **inputs)
    assert result.counts["world_size"] == 2
    return output / "model"


@pytest.mark.slow
def test_a_killed_node_costs_the_steps_since_the_last_checkpoint_and_no_bit(tmp_path, kubelet, capfd):
    checkpoints = tmp_path / "cluster/store/pretrain" / f"{KEY}.partial/checkpoints"
    killed: list[str] = []

    def kill_a_node() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            time.sleep(0.01)
            if checkpoints.is_dir() and any(not entry.name.startswith(".") for entry in checkpoints.iterdir()):
                (job,) = kubelet.api.store.all("trainjobs")
                kubelet.kill_node(job["metadata"]["name"], 1)
                killed.append(job["metadata"]["name"])

    thread = threading.Thread(target=kill_a_node)
    thread.start()
    home = tmp_path / "cluster"
    model = train(home, launcher(kubelet.api, home, place_changes=PLACE, interval=0.2), nodes=2)
    thread.join()
    assert kubelet.restarts == {killed[0]: 1}
    assert kubelet.api.store.all("trainjobs") == kubelet.api.store.all("pods") == []
    shown = capfd.readouterr().out
    assert "resum" in shown.lower() or "going on" in shown.lower()  # what rank 0 said, through the pod's log
    assert weights_digest(model) == weights_digest(train(tmp_path / "laptop", LocalLauncher(), nodes=1))
