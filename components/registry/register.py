"""Enter a judged model into the MLflow registry, once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from modelmill.components.core import events, tracking
from modelmill.components.core.code import package_version
from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.mlflow_store import experiment_id, safe_uri, sqlite_path
from modelmill.components.core.step import StepResult, step_options
from modelmill.components.core.weights import weights_digest
from modelmill.components.registry.config import RegisterConfig
from modelmill.components.registry.flavors import Flavor, flavor_of
from modelmill.components.registry.judged_card import judged_card, judged_description, public_base
from modelmill.components.registry.model_card import model_card, short_description
from modelmill.components.registry.model_source import RECORDS_FILE
from modelmill.components.registry.store import FILES_TAG, WEIGHTS_TAG, files_digest, open_registry, version_of
from modelmill.components.registry.verdict import Verdict, is_gate, read_verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("modelmill")
_RUN_SECONDS = 30.0  # for the delivery process to open this step's run in MLflow; importing it alone takes seconds
_HEADLINES = ("test_loss", "perplexity", "bits_per_byte", "bigram_bits_per_byte", "unigram_bits_per_byte")
_HANDED_ON = ("dataset_digest", "tokenizer_digest", "base_digest", "adapter_digest", "method")


@dataclass(frozen=True)
class _Entry:
    """What a new version consists of beside the exported files."""

    flavor: Flavor
    card: str
    description: str
    tags: dict[str, str]
    records: tuple[str, ...]


@step_options(reuse=False)
def register_model(
    config: RegisterConfig,
    output: Path,
    *,
    model: Manifest,
    evaluation: Manifest,
    instructions: Manifest | None = None,
) -> StepResult:
    """Register a model's exported folder as a version of `config.name`, with tags, an alias and a model card.

    Weights and files that the registry already holds under that name get no second version: the alias moves to the
    one they have. Writes `model_card.md` and `registration.json`. The version loads with
    `mlflow.pyfunc.load_model("models:/<name>@<alias>")`, and holds `training_records.txt` where the training records
    are known: their ids, sorted, one a line.

    Args:
        config: name, alias, description, tags and the recipe.
        output: an empty folder.
        model: manifest of an exported model (`model/`); metadata `flavor` says how it is served.
        evaluation: manifest of its held-out evaluation, or of a gate that judged it.
        instructions: manifest of `prepare_instructions` that it learnt from.

    Returns:
        kind `registration`; metadata `name`, `version`, `alias`, `weights_digest`.

    Raises:
        UserError: the tracking server cannot be used, the evaluation or the data is another model's, no loader serves
            this flavor, or the files are not the weights the training step wrote.
    """
    digest, files = str(model.metadata.get(WEIGHTS_TAG, "")), files_digest(model)
    entry = _entry(config, model, evaluation, instructions, files)
    (output / "model_card.md").write_text(entry.card, encoding="utf-8")
    with open_registry() as client:
        existing = version_of(client, config.name, digest, files)
        if existing is None:
            package = _package(model, digest, output.parent / "package", entry)
            version = _create(client, config, package, entry)
        else:
            version = str(existing.version)
            _judge_again(client, config.name, version, existing.tags, entry.tags)
        client.set_registered_model_alias(config.name, config.alias, version)
    found = existing is not None
    what = "already holds these weights as" if found else "has a new"
    logger.info("%s %s version %s; alias %s points to it", config.name, what, version, config.alias)
    registration = {
        "name": config.name,
        "version": version,
        "alias": config.alias,
        WEIGHTS_TAG: digest,
        "registered": "earlier" if found else "now",
        "tracking_uri": safe_uri(Home.current().tracking_uri),
    }
    (output / "registration.json").write_text(json.dumps(registration, indent=1) + "\n")
    tracking.set_tags({"model": f"models:/{config.name}/{version}", "registered": registration["registered"]})
    tracking.log_artifact(output / "model_card.md")
    kept = ("name", "version", "alias", WEIGHTS_TAG)
    return StepResult("registration", metadata={name: registration[name] for name in kept})


def _entry(
    config: RegisterConfig, model: Manifest, evaluation: Manifest, instructions: Manifest | None, files: str
) -> _Entry:
    """Check what was given against each other, and say what the registry will hold.

    Raises:
        UserError: see `register_model`.
    """
    digest = str(model.metadata.get(WEIGHTS_TAG, ""))
    flavor_name, flavor = flavor_of(model)
    flavor.loader()
    records = _records(model, instructions)
    tags = _tags(config, model, flavor_name, files)
    if is_gate(evaluation):
        verdict = read_verdict(evaluation, digest)
        tags |= _gate_tags(verdict)
        card = judged_card(config, model, verdict, flavor, instructions, package_version())
        description = judged_description(config, model, verdict)
    else:
        if evaluation.metadata.get(WEIGHTS_TAG) != digest:
            raise UserError("evaluation: it judged other weights than the model's; evaluate this model first")
        facts = json.loads(evaluation.path("evaluation.json").read_text(encoding="utf-8"))
        tags |= {name: f"{evaluation.metrics[name]:.6g}" for name in _HEADLINES if name in evaluation.metrics}
        card = model_card(config, facts, package_version(), flavor)
        description = short_description(config, facts)
    return _Entry(flavor, card, description, {name: value for name, value in tags.items() if value}, records)


def _records(model: Manifest, instructions: Manifest | None) -> tuple[str, ...]:
    """Ids of what the model was trained on, as far as that is known: by its folder, and by its instructions."""
    ids: set[str] = set()
    if any(entry.path == RECORDS_FILE for entry in model.files):
        ids.update(model.path(RECORDS_FILE).read_text(encoding="utf-8").split())
    if instructions is not None:
        learnt = model.metadata.get("dataset_digest")
        if learnt is not None and learnt != instructions.digest:
            raise UserError(
                f"instructions: the model learnt from the data {str(learnt)[:16]}, these are "
                f"{instructions.digest[:16]}; give those it learnt from"
            )
        with instructions.path("train.jsonl").open(encoding="utf-8") as lines:
            ids.update(str(json.loads(line)["id"]) for line in lines)
    return tuple(sorted(ids))


def _tags(config: RegisterConfig, model: Manifest, flavor: str, files: str) -> dict[str, str]:
    run = events.run_directory()
    return {
        **config.tags,
        **{name: str(model.metadata.get(name) or "") for name in (WEIGHTS_TAG, *_HANDED_ON)},
        FILES_TAG: files,
        "base": public_base(model),
        "flavor": flavor,
        "recipe": config.recipe_name,
        "recipe_hash": config.recipe_hash,
        "code_version": package_version(),
        "code_digest": model.code,
        "run_id": run.name if run else "",
    }


def _gate_tags(verdict: Verdict) -> dict[str, str]:
    return {
        "gate": verdict.word,
        "gate_digest": verdict.digest,
        "gate_metric": verdict.metric,
        "gate_gain": f"{verdict.gain:.6g}",
    }


def _judge_again(
    client: MlflowClient, name: str, version: str, old: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """A version's tags tell its newest gate; all else that they say stays what it was."""
    for tag in ("gate", "gate_digest", "gate_metric", "gate_gain"):
        if tag in tags and old.get(tag) != tags[tag]:
            client.set_model_version_tag(name, version, tag, tags[tag])


def _package(model: Manifest, digest: str, folder: Path, entry: _Entry) -> Path:
    """The model as an MLflow folder: the exported files as they are, a loader, requirements and the card."""
    import mlflow.pyfunc

    exported, flavor = model.folder("model"), entry.flavor
    shutil.rmtree(folder, ignore_errors=True)
    with warnings.catch_warnings():
        # It asks for an input example, which it would run through the model; the signature is given.
        warnings.simplefilter("ignore", UserWarning)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=flavor.module,
            data_path=str(exported),
            code_paths=[str(flavor.loader())],
            signature=flavor.signature(model),
            pip_requirements=[_pinned(name) for name in flavor.requirements],
        )
    copied = weights_digest(folder / "data" / "model")
    if copied != digest:
        raise UserError(
            f"model: the files in {exported} have the weights digest {copied[:16]}, the training step wrote "
            f"{digest[:16]}; delete the folder of that step and run again"
        )
    (folder / "model_card.md").write_text(entry.card, encoding="utf-8")
    if entry.records:
        (folder / RECORDS_FILE).write_text("".join(f"{identity}\n" for identity in entry.records))
    return folder


def _pinned(name: str) -> str:
    try:
        return f"{name}=={metadata.version(name).partition('+')[0]}"
    except metadata.PackageNotFoundError:
        raise UserError(f"model: serving it needs {name}, which is not installed; pip install {name}") from None


def _create(client: MlflowClient, config: RegisterConfig, package: Path, entry: _Entry) -> str:
    """Upload the folder, make the version, and give way to an equal one that was made at the same time."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(config.name, description=config.description or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    uri = Home.current().tracking_uri
    run_id, own = _source_run(client, uri, config.name)
    events.progress("uploading the model")
    client.log_artifacts(run_id, str(package), "model")
    source = f"{client.get_run(run_id).info.artifact_uri}/model"
    made = client.create_model_version(config.name, source, run_id, tags=entry.tags, description=entry.description)
    if own:
        client.log_artifact(run_id, str(package / "model_card.md"))
        client.set_terminated(run_id)
    shutil.rmtree(package, ignore_errors=True)
    first = version_of(client, config.name, entry.tags[WEIGHTS_TAG], entry.tags[FILES_TAG])
    if first is None or str(first.version) == str(made.version):
        return str(made.version)
    client.delete_model_version(config.name, str(made.version))  # another run was a moment earlier
    return str(first.version)


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
