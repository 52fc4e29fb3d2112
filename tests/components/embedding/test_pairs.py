"""Pairs: what a record must hold, and that no text stands in two splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import validate
from modelmill.components.data.documents import SPLITS
from modelmill.components.embedding.config import PairsConfig
from modelmill.components.embedding.pairs import prepare_pairs, read_pairs
from tests.components.embedding.samples import make_pairs, records, write_lines


def prepare(tmp_path: Path, source: dict[str, Any], **changes: Any) -> Manifest:
    output = tmp_path / "data"
    output.mkdir()
    config = PairsConfig(source=[{"type": "files", **source}], **{"validation_fraction": 0.0, **changes})
    result = prepare_pairs(config, output)
    return Manifest.describe(output, kind=result.kind, counts=result.counts, metadata=result.metadata)


def texts(pairs: Manifest, split: str) -> list[tuple[str, str]]:
    return [(pair["question"], pair["positive"]) for pair in read_pairs(pairs, split, together=True)]


class TestForms:
    def test_a_json_list_and_lines_with_the_same_pairs_are_the_same_data(self, tmp_path: Path) -> None:
        """Requirement 4.1: a JSON list whose items have sentence1 and sentence2."""
        listed = tmp_path / "training.json"
        listed.write_text(json.dumps(records(40)))
        lines = write_lines(tmp_path / "training.jsonl", records(40))
        made = []
        for number, path in enumerate((listed, lines)):
            folder = tmp_path / str(number)
            folder.mkdir()
            made.append(prepare(folder, {"paths": [str(path)]}))
        assert made[0].digest == made[1].digest
        assert sum(made[0].counts[f"{split}_pairs"] for split in SPLITS) == 40

    def test_fields_of_any_name_make_the_texts(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"p{n}", "completion": f"c{n}", "title": f"t{n}"} for n in range(30)]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        fields = {"question": "query: {prompt}", "positive": "{title}\n{completion}"}
        pairs = prepare(tmp_path, {"paths": [str(path)], "fields": fields}, test_fraction=0.3)
        found = {pair for split in SPLITS for pair in texts(pairs, split)}
        assert found == {(f"query: p{n}", f"t{n}\nc{n}") for n in range(30)}

    def test_text_beside_the_records_is_passed_over(self, tmp_path: Path) -> None:
        folder = tmp_path / "set"
        folder.mkdir()
        (folder / "README.md").write_text("About these pairs.")
        write_lines(folder / "pairs.jsonl", records(30))
        assert prepare(tmp_path, {"paths": [str(folder)]}).counts["read_records"] == 30

    def test_scores_say_what_belongs_together(self, tmp_path: Path) -> None:
        rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "label": n / 39} for n in range(40)]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        pairs = prepare(tmp_path, {"paths": [str(path)], "fields": {"score": "label"}}, test_fraction=0.2)
        assert pairs.metadata["scored"]
        together = [pair for split in SPLITS for pair in read_pairs(pairs, split, together=True)]
        everything = [pair for split in SPLITS for pair in read_pairs(pairs, split, together=False)]
        assert len(everything) == 40
        assert sorted(pair["score"] for pair in together) == [n / 39 for n in range(20, 40)]


@pytest.fixture(scope="module")
def tangled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Questions with several answers and answers to several questions."""
    rows = [{"sentence1": f"question {n % 37}", "sentence2": f"answer {n % 53}"} for n in range(400)]
    folder = tmp_path_factory.mktemp("tangled")
    return prepare(folder, {"paths": [str(write_lines(folder / "rows.jsonl", rows))]}, validation_fraction=0.1)


class TestSplits:
    @pytest.mark.parametrize("side", [0, 1], ids=["question", "answer"])
    def test_no_text_is_in_two_splits(self, tangled: Manifest, side: int) -> None:
        found = {split: {pair[side] for pair in texts(tangled, split)} for split in SPLITS}
        assert all(found.values())
        assert not found["train"] & (found["validation"] | found["test"])
        assert not found["validation"] & found["test"]

    def test_every_record_is_accounted_for(self, tangled: Manifest) -> None:
        counts = tangled.counts
        lost = counts["dropped_duplicate"] + counts["dropped_in_other_split"]
        assert counts["read_records"] == 400 == lost + sum(counts[f"{split}_pairs"] for split in SPLITS)
        assert counts["dropped_in_other_split"] > 0

    def test_case_and_blanks_make_no_other_text(self, tmp_path: Path) -> None:
        rows = [{"sentence1": f"Question {n}", "sentence2": f"Answer {n}"} for n in range(30)]
        again = [{"sentence1": f"question   {n}", "sentence2": f" answer {n}"} for n in range(30)]
        path = write_lines(tmp_path / "rows.jsonl", rows + again)
        counts = prepare(tmp_path, {"paths": [str(path)]}, test_fraction=0.2).counts
        assert (counts["dropped_duplicate"], counts["dropped_in_other_split"]) == (30, 0)

    def test_a_pair_keeps_its_split_when_others_come(self, tmp_path: Path) -> None:
        few, many = (make_pairs(tmp_path / str(count), records(count)) for count in (60, 132))
        for split in SPLITS:
            assert set(texts(few, split)) <= set(texts(many, split))

    def test_a_source_that_goes_into_the_test_takes_its_texts_from_training(self, tmp_path: Path) -> None:
        everything = write_lines(tmp_path / "all.jsonl", records(60))
        held_out = write_lines(tmp_path / "held.jsonl", records(10))
        source = [{"type": "files", "paths": [str(everything)], "into": "train"}]
        source += [{"type": "files", "paths": [str(held_out)], "into": "test"}]
        output = tmp_path / "data"
        output.mkdir()
        counts = prepare_pairs(PairsConfig(source=source), output).counts
        assert (counts["train_pairs"], counts["test_pairs"], counts["dropped_in_other_split"]) == (50, 10, 10)

    def test_documentation_is_split_by_module(self, tmp_path: Path) -> None:
        """Questions about one module stand in one split: the summary sentences of neighbours resemble each other."""
        source = {"type": "installed-docs-qa", "distributions": ["click", "rich"], "max_records": 400}
        output = tmp_path / "data"
        output.mkdir()
        result = prepare_pairs(PairsConfig(source=[source], validation_fraction=0.2, test_fraction=0.3), output)
        assert min(result.counts[f"{split}_pairs"] for split in SPLITS) > 5
        assert result.counts["dropped_in_other_split"] == 0


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ('{"sentence1": "a"}', ["line 3", "sentence2"]),
            ('{"sentence1": "a", "sentence2": 3}', ["line 3", "sentence2", "int"]),
            ('{"sentence1": " ", "sentence2": "b"}', ["line 3", "empty"]),
            ('["a", "b"]', ["line 3", "list"]),
            ('{"sentence1": "a"', ["line 3", "JSON"]),
        ],
        ids=["missing", "number", "empty", "list", "torn"],
    )
    def test_a_bad_record_is_named(self, tmp_path: Path, line: str, words: list[str]) -> None:
        path = write_lines(tmp_path / "rows.jsonl", records(2))
        with path.open("a") as file:
            file.write(line + "\n")
        with pytest.raises(UserError) as error:
            prepare(tmp_path, {"paths": [str(path)]})
        named = str(error.value).replace("rows.jsonl:3", "line 3")
        assert all(word in named for word in [*words, "pairs.source", "max_bad_records"]), named

    @pytest.mark.parametrize("value", [2, -0.1, "high", None, True], ids=repr)
    def test_a_score_that_is_none_is_named(self, tmp_path: Path, value: Any) -> None:
        rows = [{"sentence1": "a", "sentence2": "b", "score": value}]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        with pytest.raises(UserError, match=r"rows\.jsonl:1 score is"):
            prepare(tmp_path, {"paths": [str(path)], "fields": {"score": "score"}})

    def test_allowed_bad_records_are_counted(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "rows.jsonl", [*records(30), {"sentence1": "a"}])
        counts = prepare(tmp_path, {"paths": [str(path)]}, max_bad_records=1, test_fraction=0.2).counts
        assert counts["dropped_missing_field"] == 1

    def test_an_item_of_a_json_list_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "training.json"
        path.write_text(json.dumps([*records(2), {"sentence1": "a"}]))
        with pytest.raises(UserError, match=r"training\.json item 3 has no field 'sentence2'"):
            prepare(tmp_path, {"paths": [str(path)]})

    def test_a_json_file_that_holds_no_list_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "training.json"
        path.write_text(json.dumps(records(1)[0]))
        with pytest.raises(UserError, match="holds a dict, not a list"):
            prepare(tmp_path, {"paths": [str(path)]})

    def test_an_empty_test_split_is_named(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "rows.jsonl", records(3))
        with pytest.raises(UserError, match=r"pairs\.test_fraction: 0\.01 of 3 pairs"):
            prepare(tmp_path, {"paths": [str(path)]}, test_fraction=0.01)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"fields": {"question": "text"}}, "names no field"),
            ({"fields": {"question": "{a"}}, "expected '}'"),
            ({"paths": []}, "paths"),
        ],
        ids=["plain", "open", "none"],
    )
    def test_a_wrong_source_is_named(self, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            validate(PairsConfig, {"source": {"type": "files", "paths": ["x.jsonl"], **changes}})

    def test_a_missing_file_is_named_before_anything_runs(self) -> None:
        config = PairsConfig(source=[{"type": "files", "paths": ["nowhere.json"]}])
        with pytest.raises(UserError, match=r"pairs\.source\.paths: nowhere\.json does not exist"):
            config.fingerprint()


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (make_pairs(tmp_path / name) for name in ("one", "two"))
    assert first.digest == second.digest
