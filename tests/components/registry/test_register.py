"""A version is registered once, loads back as the same model, and trouble with the server is one line."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelmill.components.core.errors import UserError
from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult, options_of
from modelmill.components.core.weights import weights_digest
from modelmill.components.evaluation.config import EvaluationConfig
from modelmill.components.evaluation.heldout import evaluate_heldout
from modelmill.components.registry.config import RegisterConfig
from modelmill.components.registry.register import register_model
from modelmill.components.registry.store import check_files, version_of
from tests.components.conftest import RunFolder, TrackingServer
from tests.components.small_model import SmallModel

Judged = Callable[[Manifest], Manifest]


@pytest.fixture(scope="module")
def judged(small_model: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Evaluation manifests of the small models, each made once."""
    made: dict[str, Manifest] = {}

    def evaluation(model: Manifest) -> Manifest:
        if model.digest not in made:
            output = tmp_path_factory.mktemp("evaluation") / "data"
            output.mkdir()
            config = EvaluationConfig(num_prompts=1, max_new_tokens=2)
            result = evaluate_heldout(config, output, model=model, tokens=small_model.tokens)
            fields = {"counts": result.counts, "metrics": result.metrics, "metadata": result.metadata}
            made[model.digest] = Manifest.describe(output, kind=result.kind, **fields)
        return made[model.digest]

    return evaluation


def enter(folder: Path, model: Manifest, evaluation: Manifest, **config: Any) -> StepResult:
    output = folder / "data"
    output.mkdir(parents=True)
    settings = {"name": "small-llama", "recipe_name": "tests/small", "recipe_hash": "feedbeef", **config}
    return register_model(RegisterConfig(**settings), output, model=model, evaluation=evaluation)


def versions(client: MlflowClient, name: str = "small-llama") -> list[Any]:
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda version: int(version.version))


def test_a_version_loads_back_as_the_same_model(
    store_home: Home, tmp_path: Path, small_model: SmallModel, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model.trained
    result = enter(tmp_path, model, judged(model), description="Tests only", tags={"team": "tests"})
    digest = model.metadata["weights_digest"]
    expected = {"name": "small-llama", "version": "1", "alias": "candidate", "weights_digest": digest}
    assert result.metadata == expected
    registration = json.loads((tmp_path / "data" / "registration.json").read_text())
    assert registration["registered"] == "now"

    client = MlflowClient(store_home.tracking_uri)
    version = client.get_model_version_by_alias("small-llama", "candidate")
    assert version.version == "1" or version.version == 1
    tags = version.tags
    assert tags["weights_digest"] == digest
    assert tags["dataset_digest"] == small_model.tokens.digest
    assert (tags["recipe"], tags["recipe_hash"], tags["team"]) == ("tests/small", "feedbeef", "tests")
    assert tags["code_digest"] == "c0de"
    assert float(tags["test_loss"]) == pytest.approx(judged(model).metrics["test_loss"], rel=1e-5)
    assert "bits per byte" in version.description
    files = {item.path for item in client.list_artifacts(version.run_id)}
    assert files == {"model", "model_card.md"}
    assert client.get_run(version.run_id).info.status == "FINISHED"

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_home.tracking_uri)
    mlflow.set_tracking_uri(store_home.tracking_uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/small-llama@candidate")
    finally:
        mlflow.set_tracking_uri(None)
    folder = Path(model.uri) / "model"
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([small_model.tokenizer.encode("The statement is executed").ids])
    with torch.inference_mode():
        torch.testing.assert_close(loaded.get_raw_model()(tokens).logits, reference(tokens).logits, rtol=0, atol=0)

    written = loaded.predict(["The statement", "A class"], params={"max_new_tokens": 12})
    assert len(written) == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("The statement", return_tensors="pt").input_ids
    wanted = reference.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert written[0] == tokenizer.decode(wanted[0, inputs.shape[1] :], skip_special_tokens=True)
    drawn = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert loaded.predict(["The"], params=drawn) == loaded.predict(["The"], params=drawn)
    assert loaded.predict(["The"], params=drawn) != loaded.predict(["The"], params={**drawn, "seed": 4})
    assert isinstance(loaded.predict([""], params={"max_new_tokens": 2})[0], str)


def test_the_registered_files_are_the_exported_ones_and_no_pickle(
    store_home: Home, tmp_path: Path, small_model: SmallModel, judged: Judged
) -> None:
    enter(tmp_path, small_model.trained, judged(small_model.trained))
    stored = sorted(path for path in store_home.artifact_root.rglob("*") if path.is_file())
    exported = Path(small_model.trained.uri) / "model"
    for file in exported.iterdir():
        (copy,) = [path for path in stored if path.parts[-3:] == ("data", "model", file.name)]
        assert copy.read_bytes() == file.read_bytes()
    assert not [path for path in stored if path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth", ".joblib")]
    text = "".join(path.read_text() for path in stored if path.suffix in ("", ".md", ".yaml", ".txt", ".json"))
    assert str(exported) not in text, "nothing names a path of the machine that trained it"
    assert not (tmp_path / "package").exists()


def test_the_same_weights_get_no_second_version(
    store_home: Home, tmp_path: Path, small_model: SmallModel, judged: Judged, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="modelmill")
    client = MlflowClient(store_home.tracking_uri)
    first, second = small_model.trained, small_model.untrained
    assert enter(tmp_path / "1", first, judged(first)).metadata["version"] == "1"
    assert enter(tmp_path / "2", second, judged(second)).metadata["version"] == "2"
    assert str(client.get_model_version_by_alias("small-llama", "candidate").version) == "2"
    again = enter(tmp_path / "3", first, judged(first))
    assert again.metadata["version"] == "1"
    assert json.loads((tmp_path / "3" / "data" / "registration.json").read_text())["registered"] == "earlier"
    assert "small-llama already holds these weights as version 1; alias candidate points to it" in caplog.messages
    assert [str(version.version) for version in versions(client)] == ["1", "2"]
    assert str(client.get_model_version_by_alias("small-llama", "candidate").version) == "1"
    enter(tmp_path / "4", second, judged(second), alias="spare")
    assert str(client.get_model_version_by_alias("small-llama", "spare").version) == "2"
    assert str(client.get_model_version_by_alias("small-llama", "candidate").version) == "1"
    assert enter(tmp_path / "5", first, judged(first), name="another").metadata["version"] == "1"
    assert not options_of(register_model).reuse, "the registry is outside the store of step outputs"


def test_equal_weights_beyond_the_first_page_are_found(store_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(store_home.tracking_uri)
    client.create_registered_model("many")
    for _ in range(5):
        client.create_model_version("many", "file:///nowhere", tags={"weights_digest": "d"})
    real = MlflowClient.search_model_versions
    pages = []

    def small_pages(self: MlflowClient, query: str, max_results: int, page_token: str | None) -> Any:
        pages.append(page_token)
        return real(self, query, max_results=2, page_token=page_token)

    monkeypatch.setattr(MlflowClient, "search_model_versions", small_pages)
    found = version_of(client, "many", "d", "any files")
    assert found is not None
    assert str(found.version) == "1"
    assert len(pages) == 3
    assert version_of(client, "many", "other", "any files") is None


def test_two_registrations_at_once_make_one_version(
    store_home: Home, tmp_path: Path, small_model: SmallModel, judged: Judged
) -> None:
    """Both look before either has registered; the later version gives way."""
    evaluation = judged(small_model.trained)
    for name, manifest in (("model", small_model.trained), ("evaluation", evaluation)):
        manifest.write(tmp_path / f"{name}.json")
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from modelmill.components.core.manifest import Manifest\n"
        "from modelmill.components.registry import register\n"
        "from modelmill.components.registry.config import RegisterConfig\n"
        "here, mine, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]\n"
        "real = register._package\n"
        "def package(*arguments):\n"
        "    made = real(*arguments)\n"
        "    (here / mine).touch()\n"
        "    while not (here / other).exists(): time.sleep(0.01)\n"
        "    return made\n"
        "register._package = package\n"
        "output = here / ('out-' + mine) / 'data'\noutput.mkdir(parents=True)\n"
        "result = register.register_model(RegisterConfig(name='small-llama'), output,\n"
        "    model=Manifest.read(here / 'model.json'), evaluation=Manifest.read(here / 'evaluation.json'))\n"
        "print('version', result.metadata['version'])\n"
    )
    names = [("a", "b"), ("b", "a")]
    commands = [[sys.executable, "-c", code, str(tmp_path), *pair] for pair in names]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(output.splitlines()[-1] == "version 1" for output in outputs)
    client = MlflowClient(store_home.tracking_uri)
    assert [str(version.version) for version in versions(client)] == ["1"]
    assert str(client.get_model_version_by_alias("small-llama", "candidate").version) == "1"


def test_the_source_is_the_nested_run_of_the_step(
    store_home: Home, tmp_path: Path, small_model: SmallModel, judged: Judged, make_run: Any
) -> None:
    run: RunFolder = make_run(store_home)
    run.begin()
    run.record("register_model", "start")
    inherited = {key: value for key, value in os.environ.items() if key != "MODELMILL_RUN_DIR"}
    command = [sys.executable, "-m", "modelmill.components.core.delivery", str(run.path), "--follow"]
    delivery = subprocess.Popen(command, env=inherited)
    try:
        enter(tmp_path, small_model.trained, judged(small_model.trained))
        run.record("register_model", "end", status="FINISHED")
        run.end()
        assert delivery.wait(timeout=60) == 0
    finally:
        delivery.kill()
    client = MlflowClient(store_home.tracking_uri)
    nested = json.loads((run.path / "mlflow.json").read_text())["steps"]["register_model"]
    (version,) = versions(client)
    assert version.run_id == nested
    assert version.tags["run_id"] == run.run_id
    assert {item.path for item in client.list_artifacts(nested)} == {"model", "model_card.md"}
    assert client.get_run(nested).data.tags["model"] == "models:/small-llama/1"
    assert len(client.search_runs([client.get_run(nested).info.experiment_id])) == 2, "no run of its own"


def test_on_a_server_and_without_one(
    home: Home,
    tmp_path: Path,
    small_model: SmallModel,
    judged: Judged,
    tracking_server: TrackingServer,
    monkeypatch: pytest.MonkeyPatch,
    make_run: Any,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server.uri)
    model = small_model.trained
    assert enter(tmp_path / "1", model, judged(model)).metadata["version"] == "1"
    assert enter(tmp_path / "2", model, judged(model)).metadata["version"] == "1"
    client = MlflowClient(tracking_server.uri)
    (version,) = versions(client)
    local = mlflow.artifacts.download_artifacts(
        artifact_uri="models:/small-llama@candidate", tracking_uri=tracking_server.uri, dst_path=str(tmp_path / "copy")
    )
    assert weights_digest(Path(local) / "data" / "model") == version.tags["weights_digest"]
    assert not (home.root / "mlflow.db").exists()
    (tmp_path / "scratch").mkdir()
    checked = check_files(client, version, tmp_path / "scratch")
    assert weights_digest(checked) == model.metadata["weights_digest"]
    client.set_model_version_tag("small-llama", "1", "files_digest", "0" * 64)
    with pytest.raises(UserError, match="were changed since"):
        check_files(client, client.get_model_version("small-llama", "1"), tmp_path / "scratch")
    client.set_model_version_tag("small-llama", "1", "files_digest", version.tags["files_digest"])

    tracking_server.kill()
    make_run(home, "run-7").enter("register_model")
    began = time.monotonic()
    with pytest.raises(UserError) as failure:
        enter(tmp_path / "3", model, judged(model))
    assert time.monotonic() - began < 10
    message = str(failure.value)
    assert message.startswith(f"MLFLOW_TRACKING_URI: the registry at {tracking_server.uri} cannot be used")
    assert "Connection re" in message  # refused, or reset by a server that is just dying
    assert "`modelmill resume run-7`" in message


def test_a_server_that_never_answers_is_given_up_soon(
    home: Home, tmp_path: Path, small_model: SmallModel, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = judged(small_model.trained)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        began = time.monotonic()
        with pytest.raises(UserError, match=r"timed out.*this step again"):
            enter(tmp_path, small_model.trained, evaluation)
        assert time.monotonic() - began < 10


def test_wrong_input_is_one_line_and_registers_nothing(
    store_home: Home, tmp_path: Path, small_model: SmallModel, judged: Judged
) -> None:
    model, other = small_model.trained, small_model.untrained
    with pytest.raises(UserError, match="evaluation: it judged other weights"):
        enter(tmp_path / "1", model, judged(other))
    lying = model.model_copy(update={"metadata": {**model.metadata, "weights_digest": "0" * 64}})
    vouched = judged(model)
    vouched = vouched.model_copy(update={"metadata": {**vouched.metadata, "weights_digest": "0" * 64}})
    with pytest.raises(UserError, match=r"model: the files in .* have the weights digest"):
        enter(tmp_path / "2", lying, vouched)
    client = MlflowClient(store_home.tracking_uri)
    assert client.search_registered_models() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a/b"},
        {"name": ""},
        {"alias": "latest"},
        {"alias": "v3"},
        {"alias": "with space"},
        {"tags": {"weights_digest": "x"}},
        {"tags": {"a": 1}},
    ],
)
def test_config_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RegisterConfig(**{"name": "m", **wrong})
