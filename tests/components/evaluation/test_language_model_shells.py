"""The shells of the steps that run a language model: they compile, stay small, and hand on what the steps wrote."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kfp import compiler, dsl

from modelmill.components.core.home import Home
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import run_step, section
from modelmill.components.evaluation import component, decoding
from modelmill.components.evaluation.answers import score_answers
from modelmill.components.evaluation.config import AnswerScoresConfig, GenerateConfig, TextScoresConfig
from modelmill.components.evaluation.generate import generate
from modelmill.components.evaluation.texts import score_texts
from tests.components.evaluation.answering import Answering

SHELLS = [component.generate, component.score_answers, component.score_texts]


def test_shells_run_their_steps(home: Home, tmp_path: Path, answering: Answering, text_corpus: Manifest) -> None:
    inputs = {"model": answering.model, "instructions": answering.instructions, "corpus": text_corpus}
    given: dict[str, Any] = {}
    for name, manifest in inputs.items():
        manifest.write(tmp_path / f"{name}.json")
        given[name] = SimpleNamespace(path=str(tmp_path / f"{name}.json"))
    logged: dict[str, float] = {}

    def out(name: str) -> Any:
        return SimpleNamespace(path=str(tmp_path / name), log_metric=logged.__setitem__)

    text = section("generate", GenerateConfig(max_examples=2, max_new_tokens=4), generate)
    results = (out("generations"), out("samples"), out("metrics"))
    component.generate.python_func(text, given["model"], given["instructions"], *results)
    made = Manifest.read(tmp_path / "generations")
    assert logged["examples"] == 2
    assert made.kind == "generations"
    assert (tmp_path / "samples").read_text().startswith("# Answers")
    assert not list(Path(made.uri).parent.glob("*.jsonl")), "a finished step keeps no journal"
    text = section("score_answers", AnswerScoresConfig(max_examples=2, resamples=100), score_answers)
    results = (out("answers"), out("metrics"))
    component.score_answers.python_func(text, given["model"], given["instructions"], *results)
    text = section("score_texts", TextScoresConfig(max_documents=2, resamples=100), score_texts)
    component.score_texts.python_func(text, given["model"], given["corpus"], out("texts"), out("metrics"))
    for name, metric in (("answers", "answer_loss"), ("texts", "text_bits_per_byte")):
        made = Manifest.read(tmp_path / name)
        assert made.kind == "scores"
        assert logged[metric] == made.metrics[metric]


def test_a_failed_step_goes_on_from_its_batches(
    home: Home, tmp_path: Path, answering: Answering, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {}
    for name, manifest in (("model", answering.model), ("instructions", answering.instructions)):
        manifest.write(tmp_path / f"{name}.json")
        paths[name] = str(tmp_path / f"{name}.json")
    text = section("generate", GenerateConfig(max_examples=6, max_new_tokens=4, batch_tokens=1), generate)
    computed: list[str] = []
    continue_batch = decoding.continue_batch

    def fails_at_the_fourth(model: Any, prompts: Any, names: list[str], *rest: Any, **values: Any) -> Any:
        computed.extend(names)
        if len(computed) == 4:
            raise MemoryError
        return continue_batch(model, prompts, names, *rest, **values)

    monkeypatch.setattr(decoding, "continue_batch", fails_at_the_fourth)
    with pytest.raises(SystemExit):
        run_step(generate, text, paths, {"manifest": str(tmp_path / "made.json")})
    made = run_step(generate, text, paths, {"manifest": str(tmp_path / "made.json")})
    assert made.counts["examples"] == 6
    assert len(computed) == 7, "three before the failure, the one that failed, and it again with the two after it"
    assert len(set(computed)) == 6


def test_shells_compile(tmp_path: Path) -> None:
    @dsl.pipeline(name="judged")
    def judged(writing: str, answering: str, reading: str, uri: str) -> None:
        model = dsl.importer(artifact_uri=uri, artifact_class=dsl.Model).output
        data = dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset).output
        component.generate(section=writing, model=model, instructions=data)
        component.score_answers(section=answering, model=model, instructions=data)
        component.score_texts(section=reading, model=model, corpus=data)

    compiler.Compiler().compile(judged, str(tmp_path / "judged.yaml"))
    assert (tmp_path / "judged.yaml").stat().st_size


@pytest.mark.parametrize("shell", SHELLS, ids=lambda shell: shell.name)
def test_shells_stay_shells(shell: Any) -> None:
    assert len(inspect.getsource(shell.python_func).splitlines()) <= 30
