"""What every image of ours must be, as far as it can be read from its Dockerfile."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from images.build import NAMES, default_base
from images.tag import FAMILIES, ROOT, inputs
from tests.test_packaging import extras, locked

HADOLINT = Path(sys.executable).parent / "hadolint"
STEP_FAMILIES = [family for family in FAMILIES if family != "mlflow"]


def dockerfile(family: str) -> str:
    return (ROOT / "images" / family / "Dockerfile").read_text()


def instructions(family: str) -> list[tuple[str, str]]:
    """Instructions and their arguments, with continued lines joined and comments left out."""
    lines = [line for line in dockerfile(family).splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def final_stage(family: str) -> list[tuple[str, str]]:
    found = instructions(family)
    last = max(place for place, (word, _) in enumerate(found) if word == "FROM")
    return found[last:]


def test_every_folder_is_a_family() -> None:
    folders = {path.parent.name for path in (ROOT / "images").glob("*/Dockerfile")}
    assert folders == set(FAMILIES) == set(NAMES)


@pytest.mark.parametrize("family", FAMILIES)
def test_hadolint_finds_nothing(family: str) -> None:
    if not HADOLINT.is_file():
        pytest.skip("hadolint is not in this environment; the dev extra brings it")
    done = subprocess.run([HADOLINT, f"images/{family}/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_an_argument_with_a_fixed_version(family: str) -> None:
    bases = [rest for word, rest in instructions(family) if word == "FROM"]
    assert bases == ["${BASE} AS builder", "${BASE}"]
    assert re.search(r":[^:/]*\d", default_base(family)), "a base without a version moves"
    assert ":latest" not in dockerfile(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_as_nobody_special_and_writes_below_tmp_only(family: str) -> None:
    stage = final_stage(family)
    assert [rest for word, rest in stage if word == "USER"] == ["1000:1000"]
    assert [rest for word, rest in stage if word == "WORKDIR"] == ["/tmp"]
    assert not [word for word, _ in stage if word == "VOLUME"]
    environment = dict(pair.split("=", 1) for word, rest in stage if word == "ENV" for pair in rest.split())
    assert environment["PATH"].startswith("/opt/modelmill/bin:")
    caches = {key: value for key, value in environment.items() if key == "HOME" or key.endswith(("_HOME", "DIR"))}
    assert {"HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"} <= set(caches)
    assert all(value == "/tmp" or value.startswith("/tmp/") for value in caches.values())
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("family", FAMILIES)
def test_runtime_gets_the_environment_and_nothing_else(family: str) -> None:
    """No sources, no pip and no build argument, which the history of the image would show, reach the final stage."""
    stage = final_stage(family)
    assert [rest for word, rest in stage if word in ("COPY", "ADD")] == [
        "--from=builder /opt/modelmill /opt/modelmill"
    ]
    assert not [rest for word, rest in stage if word == "ARG"]
    assert "--mount=type=secret,id=pip" in dockerfile(family)
    assert not re.search(r"(PASSWORD|SECRET|API_KEY)\s*=", dockerfile(family))


@pytest.mark.parametrize("family", STEP_FAMILIES)
def test_extras_exist_and_a_base_with_torch_keeps_it(family: str) -> None:
    (names,) = re.findall(r'"modelmill\[([a-z,]+)\]"', dockerfile(family))
    assert set(names.split(",")) <= set(extras())
    assert {"core", "train", "track"} <= set(names.split(","))
    assert "kfp" not in names.split(","), "kfp's pins of requests and urllib3 do not belong into a step's image"
    brings_torch = family in ("gpu", "neuron")
    assert ("install.sh base " in dockerfile(family)) == brings_torch


@pytest.mark.parametrize("family", STEP_FAMILIES)
def test_step_images_start_what_kfp_and_trainer_say(family: str) -> None:
    """KFP and Trainer bring their own command; an entry point, also the base's, would swallow it."""
    entry = [rest for word, rest in final_stage(family) if word == "ENTRYPOINT"]
    assert entry == ([] if family == "cpu" else ["[]"])


def test_server_answers_for_its_health_and_is_locked() -> None:
    words = dict(final_stage("mlflow"))
    assert "/health" in words["HEALTHCHECK"]
    assert words["ENTRYPOINT"] == '["mlflow", "server"]'
    pins = locked()
    lines = (ROOT / "images" / "mlflow" / "requirements.txt").read_text().splitlines()
    for line in filter(lambda each: each and not each.startswith("#"), lines):
        name = re.match(r"[A-Za-z0-9-]+", line)
        assert name
        assert "==" in line or name.group().lower() in pins, f"{line} has no version"


def test_context_holds_what_the_dockerfiles_copy() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    for family in FAMILIES:
        for word, rest in instructions(family):
            if word == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    assert source in kept or f"{source}*.whl" in kept, f"{family}: {source} is not in the context"


@pytest.mark.parametrize("family", FAMILIES)
def test_tag_covers_what_is_copied(family: str) -> None:
    covered = {path.as_posix() for path in inputs(family)}
    assert f"images/{family}/Dockerfile" in covered
    for word, rest in instructions(family):
        if word == "COPY" and not rest.startswith("--from"):
            assert {source for source in rest.split()[:-1] if not source.startswith("build/")} <= covered
    if family != "mlflow":
        assert {"setup.cfg", "components/core/step.py", "pipelines/recipes/laptop/llama-demo.yaml"} <= covered
