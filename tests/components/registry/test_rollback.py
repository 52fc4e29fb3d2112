"""The way back: to the real predecessor, once for each call, and the bad version stays out."""

from __future__ import annotations

import contextlib

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.registry.listing import list_models
from modelmill.components.registry.moves import PENDING_TAG
from modelmill.components.registry.rollback import rollback
from modelmill.components.registry.store import whoever
from tests.components.registry.test_promote import CutOffError, cut_off, places
from tests.components.registry.test_promote import name as name
from tests.components.registry.versions import Workshop


def test_the_previous_champion_reigns_again_and_a_retry_does_not_undo_it(workshop: Workshop, name: str) -> None:
    (first, _, _), (second, _, _), (_, registration, verdict) = workshop.reign(name, 3)
    done = rollback(name, "answers in the\nwrong language")
    assert (done.champion, done.rolled_back, done.previous) == ("2", "3", "1")
    assert done.weights_digest == second.metadata["weights_digest"]
    assert workshop.aliases(name) == {"champion": "2", "previous": "1"}
    tags = workshop.tags(name, "3")
    assert (tags["rolled_back"], tags["rolled_back_by"]) == ("answers in the wrong language", "tester")
    promotion = workshop.promote(registration, verdict)
    assert promotion.metadata["outcome"] == "kept"
    assert "was rolled back (answers in the wrong language)" in promotion.metadata["reason"]
    again = workshop.gate(*(workshop.model(3), second), seed=1)
    assert workshop.outcome(registration, again) == "kept", "nor by another gate"
    assert workshop.aliases(name) == {"champion": "2", "previous": "1"}
    done = rollback(name)
    assert (done.champion, done.rolled_back, done.previous, done.reason) == ("1", "2", "", "no reason given")
    assert workshop.aliases(name) == {"champion": "1"}
    with pytest.raises(UserError, match="has no version before its champion 1"):
        rollback(name)
    workshop.client.delete_model_version_tag(name, "3", "rolled_back")
    third = workshop.gate(workshop.model(3), first)
    assert workshop.outcome(registration, third) == "promoted", "somebody allowed it again"


def test_a_rollback_cut_off_at_any_write_is_finished_and_not_repeated(
    workshop: Workshop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.reign(name, 3)

    def cut(after: int) -> int:
        client = workshop.client
        for tag in [tag for tag in workshop.tags(name, "3") if tag.startswith("rolled")]:
            client.delete_model_version_tag(name, "3", tag)
        client.set_registered_model_alias(name, "champion", "3")
        client.set_registered_model_alias(name, "previous", "2")
        with monkeypatch.context() as patch:
            written = cut_off(patch, after)
            with contextlib.suppress(CutOffError):
                rollback(name, "bad")
        return written()

    for after in places(cut(100)):
        assert cut(after) == after
        done = rollback(name, "bad")
        assert (done.champion, done.rolled_back, done.previous) == ("2", "3", "1"), after
        assert workshop.aliases(name) == {"champion": "2", "previous": "1"}, after
        assert workshop.tags(name, "3")["rolled_back"] == "bad"
        assert PENDING_TAG not in workshop.client.get_registered_model(name).tags


def test_what_cannot_be_rolled_back_is_one_line(workshop: Workshop, name: str) -> None:
    with pytest.raises(UserError, match=f"no model is registered as '{name}'"):
        rollback(name)
    workshop.register(name, workshop.model(1))
    with pytest.raises(UserError, match="has no champion; promote a version first"):
        rollback(name)
    workshop.reign(f"{name}-1", 1)
    with pytest.raises(UserError, match="has no version before its champion 1"):
        rollback(f"{name}-1")
    workshop.reign(f"{name}-2", 2)
    workshop.client.delete_model_version(f"{name}-2", "1")
    with pytest.raises(UserError, match=r"has no version before its champion 2|version 1 is not in the registry"):
        rollback(f"{name}-2")


def test_the_list_tells_versions_aliases_and_decisions(workshop: Workshop, name: str) -> None:
    history = workshop.reign(name, 2)
    rollback(name, "bad")
    (found,) = list_models(name)
    assert found["aliases"] == {"candidate": "2", "champion": "1"}
    newest, oldest = found["versions"]
    assert (newest["version"], newest["aliases"], newest["rolled_back"]) == ("2", ["candidate"], "bad")
    assert (oldest["version"], oldest["promotion"], oldest["aliases"]) == ("1", "promoted", ["champion"])
    assert oldest["weights_digest"] == history[0][0].metadata["weights_digest"]
    assert name in [model["name"] for model in list_models()]
    with pytest.raises(UserError, match="no model is registered as 'none'"):
        list_models("none")


def test_who_is_asked_of_the_environment() -> None:
    assert whoever({"MODELMILL_USER": "ada", "KFP_POD_NAME": "p-1"}) == "ada"
    assert whoever({"KFP_POD_NAME": "p-1"}) == "pod p-1"
    assert whoever({})
