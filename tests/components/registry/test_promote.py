"""The champion moves through a passed gate only, whatever is repeated, cut off, tampered with or done meanwhile."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import options_of, section
from modelmill.components.registry import component
from modelmill.components.registry import promote as module
from modelmill.components.registry.config import MirrorConfig, PromoteConfig, RegisterConfig
from modelmill.components.registry.moves import PENDING_TAG
from modelmill.components.registry.promote import promote
from modelmill.components.registry.register import register_model
from modelmill.components.registry.rollback import rollback
from modelmill.components.registry.sagemaker_mirror import mirror_to_sagemaker
from tests.components.registry.versions import Workshop


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return "".join(sign if sign.isalnum() else "-" for sign in request.node.name)


def test_the_first_passed_version_becomes_the_champion(workshop: Workshop, name: str) -> None:
    model = workshop.model(1)
    verdict = workshop.gate(model, workshop.model(0))
    registration = workshop.register(name, model)
    promotion = workshop.promote(registration, verdict, note="weekly")
    assert promotion.metadata == {
        "outcome": "promoted",
        "name": name,
        "version": "1",
        "champion": "1",
        "reason": promotion.metadata["reason"],
        "weights_digest": model.metadata["weights_digest"],
    }
    assert promotion.counts == {"promoted": 1}
    assert workshop.aliases(name) == {"champion": "1"}
    tags = workshop.tags(name, "1")
    assert (tags["promotion"], tags["promotion_by"], tags["promotion_note"]) == ("promoted", "tester", "weekly")
    assert tags["promotion_gate"] == verdict.digest
    assert "rougeL" in tags["promotion_reason"]
    assert tags["promotion_replaced"] == ""
    record = json.loads(promotion.path("promotion.json").read_text())
    assert record["gate"]["reasons"] == verdict.metadata["reasons"]
    assert (record["gate"]["digest"], record["by"]) == (verdict.digest, "tester")
    report = promotion.path("report.md").read_text()
    for words in ("promoted", "weekly", verdict.metadata["reasons"][0]):
        assert words in report
    assert not options_of(promote).reuse


def test_champions_follow_each_other_and_the_last_one_is_previous(workshop: Workshop, name: str) -> None:
    workshop.reign(name, 3)
    assert workshop.aliases(name) == {"champion": "3", "previous": "2"}
    assert workshop.tags(name, "3")["promotion_replaced"] == "2"
    assert PENDING_TAG not in workshop.client.get_registered_model(name).tags


def test_a_failed_gate_is_a_result_and_moves_nothing(
    workshop: Workshop, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    ((champion, _, _),) = workshop.reign(name, 1)
    model = workshop.model(2)
    registration, verdict = workshop.register(name, model), workshop.gate(model, champion, better=False)
    promotion = workshop.promote(registration, verdict)
    assert (promotion.metadata["outcome"], promotion.counts["promoted"]) == ("kept", 0)
    assert promotion.metadata["champion"] == "1"
    assert workshop.aliases(name) == {"champion": "1"}
    assert workshop.tags(name, "2")["promotion"] == "kept"
    assert any(record.levelno == logging.WARNING and "kept" in record.message for record in caplog.records)


def test_a_version_that_beat_something_else_is_the_challenger(workshop: Workshop, name: str) -> None:
    ((champion, _, _),) = workshop.reign(name, 1)
    model = workshop.model(2)
    registration = workshop.register(name, model)
    promotion = workshop.promote(registration, workshop.gate(model, workshop.model(0)))
    assert promotion.metadata["outcome"] == "challenger"
    assert "the champion is version 1" in promotion.metadata["reason"]
    assert workshop.aliases(name) == {"challenger": "2", "champion": "1"}
    assert workshop.outcome(registration, workshop.gate(model, champion)) == "promoted"
    assert workshop.aliases(name) == {"champion": "2", "previous": "1"}


def test_a_challenger_that_then_fails_against_the_champion_is_none(workshop: Workshop, name: str) -> None:
    ((champion, _, _),) = workshop.reign(name, 1)
    model = workshop.model(2)
    registration = workshop.register(name, model)
    assert workshop.outcome(registration, workshop.gate(model, workshop.model(0))) == "challenger"
    assert workshop.outcome(registration, workshop.gate(model, champion, better=False)) == "kept"
    assert workshop.aliases(name) == {"champion": "1"}


def test_repeating_changes_nothing(workshop: Workshop, name: str) -> None:
    _, (_, registration, verdict) = workshop.reign(name, 2)
    before = workshop.aliases(name), workshop.tags(name, "2"), workshop.tags(name, "1")
    for _ in range(2):
        assert workshop.outcome(registration, verdict) == "already"
        assert (workshop.aliases(name), workshop.tags(name, "2"), workshop.tags(name, "1")) == before


def test_an_old_promotion_repeated_does_not_depose_its_successor(workshop: Workshop, name: str) -> None:
    (_, first, verdict), *_ = workshop.reign(name, 2)
    promotion = workshop.promote(first, verdict)
    assert promotion.metadata["outcome"] == "kept"
    assert "promoted by this gate before" in promotion.metadata["reason"]
    assert workshop.aliases(name) == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize("better", [True, False], ids=["challenger", "kept"])
def test_a_repeated_decision_keeps_its_time(workshop: Workshop, name: str, better: bool) -> None:
    workshop.reign(name, 1)
    model = workshop.model(2)
    registration = workshop.register(name, model)
    verdict = workshop.gate(model, workshop.model(0), better=better)
    workshop.promote(registration, verdict)
    workshop.client.set_model_version_tag(name, "2", "promotion_at", "then")
    workshop.promote(registration, verdict)
    assert workshop.tags(name, "2")["promotion_at"] == "then"


def test_the_champion_that_changed_while_files_were_checked_stays(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (champion, _, _), *_ = workshop.reign(name, 1)
    model, other = workshop.model(2), workshop.model(3)
    registration, verdict = workshop.register(name, model), workshop.gate(model, champion)
    workshop.register(name, other)
    checked = module.check_files

    def meanwhile(*arguments: Any) -> Path:
        workshop.client.set_registered_model_alias(name, "champion", "3")
        return checked(*arguments)

    monkeypatch.setattr(module, "check_files", meanwhile)
    assert workshop.outcome(registration, verdict) == "challenger"
    assert workshop.aliases(name) == {"challenger": "2", "champion": "3"}


class CutOffError(BaseException):
    """The process ends here."""


WRITES = (
    "set_registered_model_alias",
    "delete_registered_model_alias",
    "set_registered_model_tag",
    "delete_registered_model_tag",
    "set_model_version_tag",
)


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """End the process before the write of that number; returns how many were made."""
    made = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            if made == after:
                raise CutOffError
            made += 1
            return real(*arguments, **options)

        return write

    for method in WRITES:
        monkeypatch.setattr(MlflowClient, method, guarded(getattr(MlflowClient, method)))
    return lambda: made


def places(writes: int) -> list[int]:
    """Writes to be cut off at: before and after each alias, among the tags, and before the last one."""
    return [0, 1, 2, 3, 4, 5, writes - 1]


class Third:
    """Version 3 is to be promoted over version 2, which replaced version 1."""

    def __init__(self, workshop: Workshop, name: str) -> None:
        self.workshop, self.name = workshop, name
        *_, (second, _, _) = workshop.reign(name, 2)
        model = workshop.model(3)
        self.registration, self.verdict = workshop.register(name, model), workshop.gate(model, second)

    def cut_off(self, patch: pytest.MonkeyPatch, after: int) -> int:
        """Promote it anew up to the write of that number; returns how many there were."""
        client = self.workshop.client
        for tag in [tag for tag in self.workshop.tags(self.name, "3") if tag.startswith(("promotion", "rolled"))]:
            client.delete_model_version_tag(self.name, "3", tag)
        for tag in [tag for tag in self.workshop.tags(self.name, "2") if tag.startswith("rolled")]:
            client.delete_model_version_tag(self.name, "2", tag)
        for alias, version in {"champion": "2", "previous": "1", "challenger": "3"}.items():
            client.set_registered_model_alias(self.name, alias, version)
        with patch.context() as limited:
            written = cut_off(limited, after)
            with contextlib.suppress(CutOffError):
                self.workshop.promote(self.registration, self.verdict)
        return written()


def test_a_promotion_cut_off_at_any_write_is_made_once(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = Third(workshop, name)
    writes = third.cut_off(monkeypatch, 100)
    assert workshop.aliases(name) == {"champion": "3", "previous": "2"}
    for after in places(writes):
        assert third.cut_off(monkeypatch, after) == after
        assert workshop.outcome(third.registration, third.verdict) == "promoted", after
        assert workshop.aliases(name) == {"champion": "3", "previous": "2"}, after
        tags = workshop.tags(name, "3")
        assert (tags["promotion"], tags["promotion_replaced"]) == ("promoted", "2")
        assert PENDING_TAG not in workshop.client.get_registered_model(name).tags
    assert workshop.outcome(third.registration, third.verdict) == "already"


def test_a_promotion_cut_off_and_never_repeated_does_not_mislead_a_rollback(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = Third(workshop, name)
    for after, champion, back in ((1, "2", "1"), (2, "2", "1"), (3, "3", "2"), (4, "3", "2")):
        third.cut_off(monkeypatch, after)
        assert workshop.aliases(name)["champion"] == champion
        done = rollback(name, "bad answers")
        assert (done.rolled_back, done.champion) == (champion, back), after
        assert workshop.aliases(name)["champion"] == back


def altered(manifest: Manifest, **metadata: Any) -> Manifest:
    return manifest.model_copy(update={"metadata": {**manifest.metadata, **metadata}})


def refused(workshop: Workshop, name: str, registration: Manifest, verdict: Manifest, words: str) -> None:
    before = workshop.aliases(name)
    with pytest.raises(UserError, match=words):
        workshop.promote(registration, verdict)
    assert workshop.aliases(name) == before


def test_what_is_not_the_models_gate_is_refused(workshop: Workshop, name: str) -> None:
    model, other = workshop.model(1), workshop.model(0)
    registration, verdict = workshop.register(name, model), workshop.gate(model, other)
    refused(workshop, name, registration, workshop.gate(other, model), "gate: it judged other weights")
    nameless = verdict.model_copy(update={"metadata": {"passed": True, "metric": "rougeL"}})
    refused(workshop, name, registration, nameless, "weights its scores do not name")
    refused(workshop, name, registration, altered(verdict, passed=False), "run the gate again")
    refused(workshop, name, registration, altered(verdict, passed="true"), "run the gate again")
    refused(workshop, name, registration, model, "gate: .* is of kind model")
    refused(workshop, name, verdict, verdict, "registration: .* is of kind gate")
    nan = verdict.model_copy(update={"metrics": {**verdict.metrics, "gain": float("nan")}})
    refused(workshop, name, registration, nan, "its gain is nan, which decides nothing")


def test_a_gate_file_that_says_nan_or_nothing_is_refused(workshop: Workshop, name: str) -> None:
    model = workshop.model(1)
    registration, verdict = workshop.register(name, model), workshop.gate(model, workshop.model(0))
    written = json.loads(verdict.path("gate.json").read_text())
    for content, words in (
        (json.dumps({**written, "test": {**written["test"], "p_value": float("nan")}}), "its p_value is nan"),
        (json.dumps({"passed": True}), "holds no decision"),
        ("passed", "is no JSON"),
    ):
        folder = workshop.fresh("nan")
        shutil.copytree(verdict.uri, folder, dirs_exist_ok=True)
        (folder / "gate.json").write_text(content)
        bad = Manifest.describe(folder, kind="gate", metadata=verdict.metadata, metrics=verdict.metrics)
        refused(workshop, name, registration, bad, words)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "parts/config.json", "extra.py"])
def test_registered_files_that_changed_are_not_promoted(workshop: Workshop, name: str, file: str) -> None:
    model = workshop.model(1)
    registration, verdict = workshop.register(name, model), workshop.gate(model, workshop.model(0))
    source = workshop.client.get_model_version(name, "1").source
    path = Path(source.removeprefix("file://")) / "data" / "model" / file
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content[:-1] + bytes([(content or b"x")[-1] ^ 1]))
    refused(workshop, name, registration, verdict, "of .* version 1 have the .*_digest .* were changed since")
    shutil.rmtree(path.parents[1 if file.startswith("parts") else 0])
    refused(workshop, name, registration, verdict, "holds no data/model folder")


def test_a_version_that_is_gone_or_another_is_refused(workshop: Workshop, name: str) -> None:
    model = workshop.model(1)
    registration, verdict = workshop.register(name, model), workshop.gate(model, workshop.model(0))
    gone = altered(registration, version="7")
    refused(workshop, name, gone, verdict, f"{name} version 7 is not in the registry any more")
    workshop.client.set_model_version_tag(name, "1", "weights_digest", "0" * 64)
    refused(workshop, name, registration, verdict, "has the weights 0000000000000000 in the registry")


def test_a_dead_tracking_server_is_one_line(workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = workshop.model(1)
    registration, verdict = workshop.register(name, model), workshop.gate(model, workshop.model(0))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI: the registry at http://127.0.0.1:9 cannot be used"):
        workshop.promote(registration, verdict)


def test_a_move_that_cannot_be_read_is_named(workshop: Workshop, name: str) -> None:
    *_, (_, registration, verdict) = workshop.reign(name, 1)
    workshop.client.set_registered_model_tag(name, PENDING_TAG, "{}")
    refused(workshop, name, registration, verdict, f"the tag {PENDING_TAG} of .* cannot be read")


def test_two_promotions_at_once_leave_one_champion_and_its_predecessor(workshop: Workshop, name: str) -> None:
    """Two pipelines that compared with the same champion: the second finds another champion than it was judged by."""
    ((champion, _, _),) = workshop.reign(name, 1)
    rivals = []
    for seed in (2, 3):
        model = workshop.model(seed)
        rivals.append((workshop.register(name, model), workshop.gate(model, champion)))
    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(lambda rival: workshop.outcome(*rival), rivals))
    assert outcomes == ["challenger", "promoted"]
    aliases = workshop.aliases(name)
    assert aliases["previous"] == "1"
    assert {aliases["champion"], aliases["challenger"]} == {"2", "3"}


def test_the_shells_hand_manifests_on(workshop: Workshop, name: str, tmp_path: Path) -> None:
    model = workshop.model(1)
    verdict = workshop.gate(model, workshop.model(0))
    paths = {"model": model, "gate": verdict}
    for key, manifest in paths.items():
        manifest.write(tmp_path / f"{key}.json")

    def artifact(key: str) -> Any:
        return SimpleNamespace(path=str(tmp_path / key))

    registering = section("register_model", RegisterConfig(name=name), register_model)
    component.register_model.python_func(
        registering, artifact("model.json"), artifact("gate.json"), artifact("registration.json"), artifact("card.md")
    )
    promoting = section("promote", PromoteConfig(), promote)
    told = component.promote.python_func(
        promoting,
        artifact("registration.json"),
        artifact("gate.json"),
        artifact("promotion.json"),
        artifact("report.md"),
    )
    assert told is True
    assert Manifest.read(tmp_path / "promotion.json").metadata["outcome"] == "promoted"
    assert (tmp_path / "report.md").read_text().startswith(f"# {name} version 1: promoted")
    mirroring = section("mirror_to_sagemaker", MirrorConfig(), mirror_to_sagemaker)
    component.mirror_to_sagemaker.python_func(
        mirroring, artifact("registration.json"), artifact("promotion.json"), artifact("mirror.json")
    )
    assert Manifest.read(tmp_path / "mirror.json").metadata == {"package": "", "approval": ""}
