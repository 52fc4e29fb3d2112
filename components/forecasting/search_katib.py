"""A search as a Katib `Experiment` (kubeflow.org/v1beta1), for clusters whose trials Katib schedules.

    python -m modelmill.components.forecasting.search_katib --config JSON --series MANIFEST --base MANIFEST \
        --log10-learning-rate -4.3 [--steps N] [--batch-size N] [--rank N]

is what a trial's job runs: one training, judged on the validation windows, and `validation_<metric>=<value>` as its
last line, which Katib's collector reads. Katib draws numbers evenly: the learning rate is searched by its logarithm.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import HOME_VARIABLE
from modelmill.components.core.manifest import Manifest, canonical_json
from modelmill.components.core.pod_security import container_context, pod_context
from modelmill.components.forecasting.search_config import Params, SearchConfig

_MODULE = "modelmill.components.forecasting.search_katib"
_CONTAINER = "trial"
_LOGARITHM = "log10-learning-rate"


def katib_experiment(
    config: SearchConfig,
    *,
    name: str,
    namespace: str,
    image: str,
    series: str,
    base: str,
    home_claim: str,
    home: str,
    resources: dict[str, dict[str, str]] | None = None,
) -> dict[str, Any]:
    """The resource that has Katib run the trials of a search.

    Args:
        config: of the search; pruning is not Katib's and refused.
        name: of the experiment.
        namespace: where it runs.
        image: that holds this package.
        series: path of the manifest of the series, as the trials' pods see it.
        base: path of the manifest of the base, likewise.
        home_claim: PersistentVolumeClaim of the home.
        home: where it is mounted.
        resources: of a trial's container, such as `{"limits": {"nvidia.com/gpu": "1"}}`.

    Returns:
        The resource, ready for YAML or the Kubernetes client.

    Raises:
        UserError: the section asks for what Katib does not do here.
    """
    if config.pruning is not None:
        raise UserError("search.pruning: a trial of Katib is one job that reports once; set it to null")
    choices = config.space.choices()
    low, high = (f"{math.log10(rate):.12g}" for rate in config.space.learning_rate)
    space: list[dict[str, Any]] = [
        {"name": _LOGARITHM, "parameterType": "double", "feasibleSpace": {"min": low, "max": high}}
    ]
    for key, values in choices.items():
        listed = [str(value) for value in values]
        space.append({"name": _option(key), "parameterType": "categorical", "feasibleSpace": {"list": listed}})
    searched = [each["name"] for each in space]
    command = ["python", "-m", _MODULE, "--config", canonical_json(config.model_dump(mode="json"))]
    command += ["--series", series, "--base", base]
    command += [f"--{one}=${{trialParameters.{_camel(one)}}}" for one in searched]
    job = _trial_job(image, command, home_claim=home_claim, home=home, resources=resources)
    return {
        "apiVersion": "kubeflow.org/v1beta1",
        "kind": "Experiment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "objective": {"type": "minimize", "objectiveMetricName": f"validation_{config.metric}"},
            "algorithm": {
                "algorithmName": "tpe",
                "algorithmSettings": [{"name": "random_state", "value": str(config.seed)}],
            },
            "maxTrialCount": config.max_jobs,
            "parallelTrialCount": min(config.max_parallel_jobs, config.max_jobs),
            "maxFailedTrialCount": config.max_jobs,
            "metricsCollectorSpec": {"collector": {"kind": "StdOut"}},
            "parameters": space,
            "trialTemplate": {
                "primaryContainerName": _CONTAINER,
                "trialParameters": [{"name": _camel(one), "reference": one} for one in searched],
                "trialSpec": job,
            },
        },
    }


def _trial_job(
    image: str, command: list[str], *, home_claim: str, home: str, resources: dict[str, dict[str, str]] | None
) -> dict[str, Any]:
    """The Job of a trial, in which Katib fills in the values; its pod passes Pod Security `restricted`."""
    container = {
        "name": _CONTAINER,
        "image": image,
        "command": command,
        "env": [{"name": HOME_VARIABLE, "value": home}],
        "volumeMounts": [{"name": "home", "mountPath": home}],
        "securityContext": container_context(),
        **({"resources": resources} if resources else {}),
    }
    pod = {
        "restartPolicy": "Never",
        "securityContext": pod_context(),
        "containers": [container],
        "volumes": [{"name": "home", "persistentVolumeClaim": {"claimName": home_claim}}],
    }
    metadata = {"annotations": {"sidecar.istio.io/inject": "false"}}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "spec": {"backoffLimit": 0, "template": {"metadata": metadata, "spec": pod}},
    }


def _option(parameter: str) -> str:
    return parameter.replace("_", "-")


def _camel(option: str) -> str:
    first, *rest = option.split("-")
    return first + "".join(word.capitalize() for word in rest)


def run_trial(config: SearchConfig, params: Params, *, series: Manifest, base: Manifest) -> float:
    """Train by a trial's values and judge the result on the validation windows.

    Raises:
        UserError: training diverged, or the result cannot be judged.
    """
    from modelmill.components.forecasting.search_trials import train_section
    from modelmill.components.forecasting.search_validation import judge, training_view

    with tempfile.TemporaryDirectory() as folder:
        steps, view = config.steps_of(params), training_view(config, series)
        model = train_section(
            config, params, Path(folder) / "trial", step=steps, series=view, base=base, launcher=None
        )
        judged = judge(config, series, model)
    if judged.problem:
        raise UserError(f"search: {judged.problem}; narrow search.space")
    return judged.value


def main(arguments: list[str] | None = None) -> int:
    """Run one trial; exit code 0 with its value on the last line, 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}")
    for text in ("--config", "--series", "--base"):
        parser.add_argument(text, required=True)
    parser.add_argument(f"--{_LOGARITHM}", type=float, required=True)
    for key in ("steps", "batch_size", "rank"):
        parser.add_argument(f"--{_option(key)}", type=int)
    chosen = parser.parse_args(arguments)
    config = SearchConfig.model_validate_json(chosen.config)
    low, high = config.space.learning_rate
    # The ends come back from their logarithms a rounding error off.
    params: Params = {"learning_rate": min(high, max(low, 10**chosen.log10_learning_rate))}
    params |= {
        key: getattr(chosen, key) for key in ("steps", "batch_size", "rank") if getattr(chosen, key) is not None
    }
    try:
        value = run_trial(config, params, series=Manifest.read(chosen.series), base=Manifest.read(chosen.base))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"validation_{config.metric}={value!r}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
