"""Really build the cpu image and run steps in its containers, if MODELMILL_TEST_IMAGES=1 (`make test-images`).

MODELMILL_TEST_BASE             a local image with Python 3.11 and pip to build on
MODELMILL_TEST_IMAGE            an image that is already built, instead
MODELMILL_TEST_BUILD_OPTIONS    more options of the build, such as a mount with wheels
MODELMILL_TEST_ENGINE_OPTIONS   options of podman itself, such as its runtime
MODELMILL_TEST_RUN_OPTIONS      more options of `podman run`, such as limits
DOCKER_HOST                     a Docker API (podman system service has one), for kfp's own runner of containers
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from images.build import BUILT, ROOT

pytestmark = pytest.mark.skipif(
    os.environ.get("MODELMILL_TEST_IMAGES") != "1",
    reason="builds an image for minutes: MODELMILL_TEST_IMAGES=1 asks for it",
)
BASE = os.environ.get("MODELMILL_TEST_BASE", "")
_HARDENED = (
    "--read-only",
    "--tmpfs=/tmp:rw,mode=1777",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--network=none",
)


def options(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


@pytest.fixture(scope="module")
def reference() -> str:
    """The cpu image of this checkout, built now, or the one that is given."""
    if ready := os.environ.get("MODELMILL_TEST_IMAGE"):
        return ready
    if not shutil.which("podman"):
        pytest.skip("podman is not installed")
    if not BASE:
        pytest.skip("MODELMILL_TEST_BASE names no local image to build on")
    command = [sys.executable, "-m", "images.build", "cpu", "--engine", "podman", "--base", BASE, "--"]
    done = subprocess.run(
        [*command, *options("MODELMILL_TEST_BUILD_OPTIONS")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return str(json.loads((BUILT / "cpu.json").read_text())["reference"])


def podman(*arguments: str, run: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    engine = ["podman", *options("MODELMILL_TEST_ENGINE_OPTIONS")]
    started = ["run", "--rm", *_HARDENED, *options("MODELMILL_TEST_RUN_OPTIONS"), *run]
    return subprocess.run([*engine, *started, *arguments], capture_output=True, text=True)


def test_container_is_nobody_special(reference: str) -> None:
    done = podman(
        reference,
        "sh",
        "-c",
        "id -u; id -g; touch /opt/modelmill/x || echo read-only; test -e /opt/modelmill/bin/pip || echo none",
    )
    assert done.stdout.split() == ["1000", "1000", "read-only", "none"], done.stderr


def test_container_imports_what_steps_need(reference: str) -> None:
    code = (
        "import lightgbm, peft, transformers, mlflow, boto3, kubernetes, chronos, torch;"
        "from modelmill.components.launchers import reaper, sagemaker, trainjob;"
        "from modelmill.components.core import pod;"
        "from modelmill.pipelines.doctor import inside;"
        "print(torch.ones(2).sum().item())"
    )
    done = podman(reference, "env", "_KFP_RUNTIME=true", "python3", "-W", "ignore", "-c", code)
    assert done.stdout.strip() == "2.0", done.stderr


def test_image_says_what_it_is(reference: str) -> None:
    engine = ["podman", *options("MODELMILL_TEST_ENGINE_OPTIONS")]
    shown = json.loads(
        subprocess.run([*engine, "image", "inspect", reference], capture_output=True, check=True).stdout
    )
    labels = shown[0]["Config"]["Labels"]
    base = "org.opencontainers.image."
    assert labels[f"{base}version"] == reference.rpartition(":")[2]
    assert len(labels[f"{base}revision"].removesuffix("-dirty")) == 40
    assert labels[f"{base}base.digest"].startswith("sha256:")
    assert shown[0]["Config"]["User"] == "1000:1000"
    assert shown[0]["Created"].startswith(labels[f"{base}created"].removesuffix("Z")), "the commit's time, not now"
    document = json.loads((BUILT / "cpu.cdx.json").read_text())
    names = {each["name"].lower() for each in document["components"]}
    assert {"torch", "modelmill", "kfp", "lightgbm"} <= names
    assert not {"pip", "pytest", "ruff", "google-cloud-storage"} & names


def test_a_step_runs_as_kfp_starts_it(reference: str, tmp_path: Path) -> None:
    """The compiled command of a task, in a container with a read-only root; its output goes to the shared home."""
    from modelmill.components.core.step import section
    from modelmill.components.data.component import ingest_corpus
    from modelmill.pipelines import catalog

    step = catalog.load("laptop/llama-demo", ("corpus.max_bytes=300000",)).steps()[0]
    assert step.name == "ingest_corpus"
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    artifact = {"name": "manifest", "uri": "/tmp/manifest", "type": {"schemaTitle": "system.Artifact"}}
    outputs = {
        name: {"artifacts": [{**artifact, "name": name, "uri": f"/tmp/{name}"}]} for name in _outputs(ingest_corpus)
    }
    request = {
        "inputs": {"parameterValues": {"section": section(step.name, step.config, step.function)}},
        "outputs": {"artifacts": outputs, "outputFile": "/tmp/executor.json"},
    }
    shell = ingest_corpus.component_spec.implementation.container.command
    arguments = ["--executor_input", json.dumps(request), "--function_to_execute", "ingest_corpus"]
    mounted = [f"--volume={home}:/home/modelmill", "--env=MODELMILL_HOME=/home/modelmill"]
    done = podman(reference, *shell, *arguments, run=mounted)
    assert done.returncode == 0, done.stderr[-4000:]
    (manifest,) = (home / "store" / "ingest_corpus").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["counts"]
    assert manifest.stat().st_uid == 1000


def _outputs(component: Any) -> list[str]:
    """Names of a component's output artifacts."""
    return list(component.component_spec.outputs or {})


def test_two_steps_run_through_kfps_docker_runner(reference: str, tmp_path: Path) -> None:
    """A pipeline of two steps, each in a container of its own, started by kfp as it starts any image."""
    if "DOCKER_HOST" not in os.environ:
        pytest.skip("DOCKER_HOST names no Docker API")
    program = """
import json, sys
from kfp import dsl, local
from modelmill.components.core.step import section
from modelmill.components.data.component import ingest_corpus, train_tokenizer
from modelmill.pipelines import catalog

image, root = sys.argv[1:]
for component in (ingest_corpus, train_tokenizer):
    component.component_spec.implementation.container.image = image
recipe = catalog.load("laptop/llama-demo", ("corpus.max_bytes=300000", "tokenizer.vocab_size=512"))
steps = {step.name: section(step.name, step.config, step.function) for step in recipe.steps()}

@dsl.pipeline(name="two-steps")
def two_steps(ingest: str, train: str):
    corpus = ingest_corpus(section=ingest)
    train_tokenizer(section=train, corpus=corpus.outputs["manifest"])

home = {"MODELMILL_HOME": f"{root}/home"}
runner = local.DockerRunner(environment=home, read_only=True, tmpfs={"/tmp": "mode=1777"})
local.init(runner, pipeline_root=root)
two_steps(ingest=steps["ingest_corpus"], train=steps["train_tokenizer"])
"""
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["chmod", "-R", "a+rwX", str(root)], check=True)
    done = subprocess.run([sys.executable, "-c", program, reference, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    finished = {path.parent.parent.name for path in (root / "home" / "store").glob("*/*/manifest.json")}
    assert finished == {"ingest_corpus", "train_tokenizer"}
