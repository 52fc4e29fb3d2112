"""Enter an evaluated model into the MLflow registry, once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelmill.components.core import events, tracking
from modelmill.components.core.code import package_version
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.mlflow_store import (
    StoreUnavailable,
    connect,
    experiment_id,
    is_outage,
    one_line,
    safe_uri,
    sqlite_path,
)
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.uri import local_path
from modelmill.components.core.weights import weights_digest
from modelmill.components.registry import modelmill_language_model
from modelmill.components.registry.config import RegisterConfig
from modelmill.components.registry.model_card import model_card, short_description

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("modelmill")
_RUN_SECONDS = 30.0  # for the delivery process to open this step's run in MLflow; importing it alone takes seconds
_DIGEST_TAG = "weights_digest"
_HEADLINES = ("test_loss", "perplexity", "bits_per_byte", "bigram_bits_per_byte", "unigram_bits_per_byte")


@step_options(reuse=False)
def register_model(config: RegisterConfig, output: Path, *, model: Manifest, evaluation: Manifest) -> StepResult:
    """Register a model's exported folder as a version of `config.name`, with tags, an alias and a model card.

    Weights the registry already holds under that name get no second version: the alias moves to the one they have.
    Writes `model_card.md` and `registration.json`. The version loads with
    `mlflow.pyfunc.load_model("models:/<name>@<alias>")`.

    Args:
        config: name, alias, description, tags and the recipe.
        output: an empty folder.
        model: manifest of an exported model (`model/`).
        evaluation: manifest of its evaluation.

    Raises:
        UserError: the tracking server cannot be used, the evaluation is of other weights, or the files are not the
            weights the training step wrote.
    """
    digest = str(model.metadata.get(_DIGEST_TAG, ""))
    if evaluation.metadata.get(_DIGEST_TAG) != digest:
        raise UserError("evaluation: it judged other weights than the model's; evaluate this model first")
    facts = json.loads(evaluation.path("evaluation.json").read_text(encoding="utf-8"))
    card = model_card(config, facts, package_version())
    (output / "model_card.md").write_text(card, encoding="utf-8")
    with _clear_outages() as uri:
        events.progress("opening the registry")
        client = connect(uri)
        version = _existing(client, config.name, digest)
        found = version is not None
        if version is None:
            package = _package(model, digest, output.parent / "package", card)
            version = _create(client, uri, config, package, _tags(config, model, evaluation), facts)
        client.set_registered_model_alias(config.name, config.alias, version)
    what = "already holds these weights as" if found else "has a new"
    logger.info("%s %s version %s; alias %s points to it", config.name, what, version, config.alias)
    registration = {
        "name": config.name,
        "version": version,
        "alias": config.alias,
        "weights_digest": digest,
        "registered": "earlier" if found else "now",
        "tracking_uri": safe_uri(uri),
    }
    (output / "registration.json").write_text(json.dumps(registration, indent=1) + "\n")
    tracking.set_tags({"model": f"models:/{config.name}/{version}", "registered": registration["registered"]})
    tracking.log_artifact(output / "model_card.md")
    kept = ("name", "version", "alias", "weights_digest")
    return StepResult("registration", metadata={name: registration[name] for name in kept})


@contextmanager
def _clear_outages() -> Iterator[str]:
    """The tracking URI; trouble with the store inside becomes one line that says what to do."""
    uri = Home.current().tracking_uri
    run = events.run_directory()
    again = f"`modelmill resume {run.name}`" if run else "this step again"
    try:
        yield uri
    except StoreUnavailable as error:
        problem = str(error)
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.startswith("mlflow") or is_outage(error):
            problem = one_line(error)
        else:
            raise
    else:
        return
    raise UserError(
        f"MLFLOW_TRACKING_URI: the registry at {safe_uri(uri)} cannot be used ({problem}); start it or correct the "
        f"address, then run {again}"
    )


def _existing(client: MlflowClient, name: str, digest: str) -> str | None:
    """The lowest version of a registered model that has these weights, or None."""
    versions: list[int] = []
    token = None
    while True:
        query = f"name = '{name}' AND tags.`{_DIGEST_TAG}` = '{digest}'"
        page = client.search_model_versions(query, max_results=200, page_token=token)
        versions.extend(int(found.version) for found in page)
        token = page.token
        if not token:
            return str(min(versions)) if versions else None


def _package(model: Manifest, digest: str, folder: Path, card: str) -> Path:
    """The model as an MLflow folder: the exported files as they are, a loader, requirements and the card."""
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema

    for entry in model.files:
        if entry.path.startswith("model/"):
            model.path(entry.path)
    exported = local_path(model.uri) / "model"
    if not exported.is_dir():
        raise UserError(f"model: {model.uri} holds no model/ folder; give the output of a training step")
    texts = Schema([ColSpec("string")])
    params = ParamSchema(
        [
            ParamSpec("max_new_tokens", "long", 64),
            ParamSpec("temperature", "double", 0.0),
            ParamSpec("top_k", "long", 50),
            ParamSpec("seed", "long", 0),
        ]
    )
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        # It asks for an input example, which it would run through the model; the signature is given.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module="modelmill_language_model",
            data_path=str(exported),
            code_paths=[modelmill_language_model.__file__],
            signature=ModelSignature(texts, texts, params),
            pip_requirements=[_pinned(name) for name in ("torch", "transformers", "tokenizers", "safetensors")],
        )
    copied = weights_digest(folder / "data" / "model")
    if copied != digest:
        raise UserError(
            f"model: the files in {exported} have the weights digest {copied[:16]}, the training step wrote "
            f"{digest[:16]}; delete the folder of that step and run again"
        )
    (folder / "model_card.md").write_text(card, encoding="utf-8")
    return folder


def _pinned(name: str) -> str:
    return f"{name}=={metadata.version(name).partition('+')[0]}"


def _create(
    client: MlflowClient,
    uri: str,
    config: RegisterConfig,
    package: Path,
    tags: Mapping[str, str],
    facts: Mapping[str, Any],
) -> str:
    """Upload the folder, make the version, and give way to an equal one that was made at the same time."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(config.name, description=config.description or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    run_id, own = _source_run(client, uri, config.name)
    events.progress("uploading the model")
    client.log_artifacts(run_id, str(package), "model")
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    made = client.create_model_version(
        config.name, source, run_id, tags=dict(tags), description=short_description(config, facts)
    )
    if own:
        client.log_artifact(run_id, str(package / "model_card.md"))
        client.set_terminated(run_id)
    shutil.rmtree(package, ignore_errors=True)
    first = _existing(client, config.name, tags[_DIGEST_TAG])
    if first is None or first == str(made.version):
        return str(made.version)
    client.delete_model_version(config.name, str(made.version))  # another run was a moment earlier
    return first


def _source_run(client: MlflowClient, uri: str, name: str) -> tuple[str, bool]:
    """The MLflow run a version comes from, and whether it was made here.

    Inside a pipeline run it is this step's nested run, opened by the delivery process; else the run that
    `MLFLOW_RUN_ID` names; else a run of its own.
    """
    run_dir, step = events.run_directory(), os.environ.get(events.STEP_VARIABLE, "")
    deadline = time.monotonic() + _RUN_SECONDS
    while run_dir is not None:
        try:
            index = json.loads((run_dir / "mlflow.json").read_bytes())
        except (OSError, ValueError):
            index = {}
        if index.get("tracking_uri", safe_uri(uri)) != safe_uri(uri):
            break
        if step in index.get("steps", {}):
            return str(index["steps"][step]), False
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    outer = os.environ.get("MLFLOW_RUN_ID")
    if outer:
        return outer, False
    root = Home.current().artifact_root if sqlite_path(uri) is not None else None
    run = client.create_run(experiment_id(client, "modelmill", root), run_name=f"register {name}")
    return run.info.run_id, True


def _tags(config: RegisterConfig, model: Manifest, evaluation: Manifest) -> dict[str, str]:
    run = events.run_directory()
    tags = {
        _DIGEST_TAG: str(model.metadata[_DIGEST_TAG]),
        "dataset_digest": str(model.metadata.get("dataset_digest", "")),
        "tokenizer_digest": str(model.metadata.get("tokenizer_digest", "")),
        "recipe": config.recipe_name,
        "recipe_hash": config.recipe_hash,
        "code_version": package_version(),
        "code_digest": model.code,
        "run_id": run.name if run else "",
    }
    tags.update({name: f"{evaluation.metrics[name]:.6g}" for name in _HEADLINES if name in evaluation.metrics})
    return {name: value for name, value in {**config.tags, **tags}.items() if value}
