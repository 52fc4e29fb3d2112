"""A search as a Katib experiment: the shape its documentation describes, and a trial's job run for real."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelmill.components.core.errors import UserError
from modelmill.components.forecasting import search_validation
from modelmill.components.forecasting.search_config import SearchConfig
from modelmill.components.forecasting.search_katib import katib_experiment, main
from tests.components.forecasting import searches
from tests.components.forecasting.searches import Trainings, loss, section
from tests.manifests import restricted

PLACE: dict[str, Any] = {"name": "sales", "namespace": "team", "image": "registry/modelmill@sha256:0", "home": "/home"}
PLACE |= {"series": "/home/series.json", "base": "/home/base.json", "home_claim": "home"}


def rendered(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(yaml.safe_dump(katib_experiment(section(**changes), **PLACE)))


def test_the_experiment_is_the_section() -> None:
    found = rendered(max_jobs=12, max_parallel_jobs=3, metric="wql", space={"steps": [8, 16]})
    assert (found["apiVersion"], found["kind"]) == ("kubeflow.org/v1beta1", "Experiment")
    spec = found["spec"]
    assert spec["objective"] == {"type": "minimize", "objectiveMetricName": "validation_wql"}
    assert spec["algorithm"]["algorithmSettings"] == [{"name": "random_state", "value": "10"}]
    assert (spec["maxTrialCount"], spec["parallelTrialCount"]) == (12, 3)
    assert [each["name"] for each in spec["parameters"]] == ["log10-learning-rate", "steps"]
    rate, steps = (each["feasibleSpace"] for each in spec["parameters"])
    assert [float(rate["min"]), float(rate["max"])] == pytest.approx([-5, -4])
    assert steps == {"list": ["8", "16"]}, "Katib takes text"


def test_every_parameter_reaches_the_trial() -> None:
    template = rendered(space={"batch_size": [8], "steps": [8]})["spec"]["trialTemplate"]
    (container,) = template["trialSpec"]["spec"]["template"]["spec"]["containers"]
    assert container["name"] == template["primaryContainerName"]
    names = {one["name"]: one["reference"] for one in template["trialParameters"]}
    assert names == {"log10LearningRate": "log10-learning-rate", "batchSize": "batch-size", "steps": "steps"}
    for name, reference in names.items():
        assert f"--{reference}=${{trialParameters.{name}}}" in container["command"]
    told = container["command"][container["command"].index("--config") + 1]
    assert SearchConfig.model_validate(json.loads(told)) == section(space={"batch_size": [8], "steps": [8]})
    assert template["trialSpec"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert template["trialSpec"]["spec"]["backoffLimit"] == 0


def test_giving_up_is_refused() -> None:
    with pytest.raises(UserError, match=r"search\.pruning: a trial of Katib is one job"):
        katib_experiment(section(pruning={}), **PLACE)


def test_a_trials_pod_is_restricted() -> None:
    pod = rendered()["spec"]["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]
    assert restricted.violations(pod) == []


def test_a_trial_prints_what_the_collector_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = searches.inputs(tmp_path / "inputs")
    for name, manifest in given.items():
        manifest.write(tmp_path / f"{name}.json")
    command = ["--config", section().model_dump_json(), "--series", str(tmp_path / "series.json")]
    command += ["--base", str(tmp_path / "base.json"), "--log10-learning-rate=-4.5", "--steps", "16"]
    with Trainings() as trainings:
        monkeypatch.setattr(search_validation, "judge", trainings._judge)
        assert main(command) == 0
        name, _, value = capsys.readouterr().out.splitlines()[-1].partition("=")
        assert name == "validation_sql"
        assert float(value) == pytest.approx(loss(10**-4.5, 16))
        trainings.values = {0: math.nan}
        assert main(command) == 2
        assert "forecasts are not finite; narrow search.space" in capsys.readouterr().err
