"""Questions about installed packages: real, the same everywhere, and in the test only about what was held out."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from modelmill.components.core.manifest import Manifest
from modelmill.components.data.cleaning import digest, normalize
from modelmill.components.data.documents import SPLITS, read_documents
from modelmill.components.data.installed_docs import read_documentation
from modelmill.components.data.installed_docs_qa import QuestionAnswer, read_questions, summary_sentence
from modelmill.components.data.instruction_config import InstalledDocsQuestions
from modelmill.components.data.instruction_rows import read_conversations
from modelmill.components.data.instructions import prepare_instructions
from tests.components.data.conftest import DISTRIBUTIONS, Produce
from tests.components.data.instruction_data import config

SHARES = {"validation_fraction": 0.2, "test_fraction": 0.2}


def pairs(
    names: list[str], corpus: Manifest | None = None, seed: int = 0, **source: int
) -> tuple[list[QuestionAnswer], Counter[str]]:
    skipped: Counter[str] = Counter()
    asked = InstalledDocsQuestions.model_validate({"type": "installed-docs-qa", "distributions": names} | source)
    return read_questions(asked, config(asked.model_dump(), **SHARES, seed=seed), corpus, skipped), skipped


def texts(corpus: Manifest, split: str) -> list[str]:
    return [text for batch in read_documents(corpus.path(f"{split}.arrow")) for text in batch]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return it. And more.", "Return it."),
        ("Return it\nover two lines.\n\nMore.", "Return it over two lines."),
        ("  \nUse e.g. this, i.e. that. More.", "Use e.g. this, i.e. that."),
        ("See J. Doe for x. More.", "See J. Doe for x."),
        ("Version 1.2 of a.b is out! Yes.", "Version 1.2 of a.b is out!"),
        ("No end mark\n\nMore.", "No end mark"),
        ("", ""),
    ],
)
def test_summary_sentence(text: str, sentence: str) -> None:
    assert summary_sentence(text) == sentence


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with one module per name; it must not be imported."""
    site = tmp_path / "site"
    (site / "demo").mkdir(parents=True)
    info = site / "demo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n\n# Demo\n")
    padding = '"""Module text that is long enough to be worth a look at what else it may say about itself. ' + "x" * 50
    body = (
        padding + '"""\nraise SystemExit\nclass Solver(Base):\n    """Solves a system of equations."""\n'
        '    def solve(self, a: int) -> int:\n        """Solve for a. Slowly."""\n'
        '    def _hidden(self):\n        """Must not be asked about."""\n'
        'def short():\n    """Short."""\ndef marked():\n    """solve(a, b) -> the solution of it"""\n'
        "def long("
        + ", ".join(f"argument{n}=None" for n in range(30))
        + '):\n    """Take many arguments at once."""\n'
    )
    for name in ("solver", "_private"):
        (site / "demo" / f"{name}.py").write_text(body)
    (info / "RECORD").write_text("demo/solver.py,,\ndemo/_private.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.mark.usefixtures("installed")
def test_pairs_of_a_module() -> None:
    found, skipped = pairs(["demo"])
    answers = {pair.place.rpartition(" ")[2]: pair.answer for pair in found}
    assert answers == {
        "demo.solver.Solver": "Solves a system of equations.",
        "demo.solver.long": "Take many arguments at once.",
    }
    assert skipped == {"answer_length": 2, "no_sentence": 1}
    asked = {pair.place.rpartition(" ")[2]: pair.messages[0].content for pair in found}
    assert "class Solver(Base)" in asked["demo.solver.Solver"]
    assert "argument0=None" in asked["demo.solver.long"]
    assert "..." in asked["demo.solver.long"]
    assert {pair.split for pair in found} <= set(SPLITS)
    assert len({pair.split for pair in found}) == 1
    assert not any(name.split(".")[0] == "demo" for name in sys.modules)


def test_questions_are_many_and_vary() -> None:
    found, _ = pairs(["click", "Flask"])
    assert len(found) > 300
    assert len({pair.messages[0].content for pair in found}) > 0.99 * len(found)
    beginnings = Counter(pair.messages[0].content.split("`")[0] for pair in found)
    assert len(beginnings) >= 5
    assert max(beginnings.values()) < 0.5 * len(found)
    assert all(20 <= len(pair.answer) <= 300 and "\n" not in pair.answer for pair in found)


def test_a_cap_takes_the_first_ones() -> None:
    whole, _ = pairs(["click", "Flask"])
    capped, _ = pairs(["click", "Flask"], max_records=50)
    assert len(capped) > 40
    held_out = {pair.answer for pair in whole if pair.split != "train"}
    assert [p for p in capped if p.split == "train"] == [p for p in whole if p.split == "train"][
        : sum(p.split == "train" for p in capped)
    ]
    assert {pair.answer for pair in capped if pair.split != "train"} - held_out <= {pair.answer for pair in whole} | {
        pair.answer for pair in capped
    }


def test_another_seed_gives_another_split_of_modules() -> None:
    one, _ = pairs(["click", "Flask"])
    two, _ = pairs(["click", "Flask"], seed=1)
    splits = [{pair.place: pair.split for pair in found} for found in (one, two)]
    assert any(splits[0][place] != splits[1][place] for place in splits[0].keys() & splits[1].keys())
    modules = {}
    for pair in one:
        module = pair.messages[0].content, pair.place
        modules.setdefault(module, set()).add(pair.split)
    assert all(len(found) == 1 for found in modules.values())


def test_the_test_asks_only_about_what_pretraining_held_out(corpus: Manifest) -> None:
    """By document, and no answer of a held-out question occurs in the training text as a summary."""
    documents = {digest(text): split for split in SPLITS for text in texts(corpus, split)}
    modules = {
        document.module: documents.get(digest(normalize(document.text)))
        for document in read_documentation(DISTRIBUTIONS, 100, Counter())
    }
    found, skipped = pairs(DISTRIBUTIONS, corpus)
    seen = {summary_sentence(part) for text in texts(corpus, "train") for part in text.split("\n\n")}
    by_split: Counter[str] = Counter()
    for pair in found:
        name = pair.place.rpartition(" ")[2]
        module = max((module for module in modules if module and name.startswith(f"{module}.")), key=len)
        if modules[module] is not None:
            assert pair.split == modules[module]
            by_split[pair.split] += 1
        if pair.split != "train":
            assert pair.answer not in seen
    assert min(by_split[split] for split in SPLITS) > 0
    assert skipped["answer_in_other_split"] > 0
    tested = {pair.answer for pair in found if pair.split == "test"}
    assert not tested & {pair.answer for pair in found if pair.split != "test"}


def test_without_the_corpus_the_same_hash_decides(corpus: Manifest) -> None:
    """Same seed and shares as the corpus: what it trained on is trained on, though nobody says so."""
    asked = InstalledDocsQuestions.model_validate({"type": "installed-docs-qa", "distributions": DISTRIBUTIONS})
    shares = {"validation_fraction": 0.1, "test_fraction": 0.1}
    alone = read_questions(asked, config(asked.model_dump(), **shares), None, Counter())
    told = read_questions(asked, config(asked.model_dump(), **shares), corpus, Counter())
    splits = {pair.place: pair.split for pair in alone}
    assert all(splits.get(pair.place, pair.split) == pair.split for pair in told)


def test_through_the_step(corpus: Manifest, tokenizer: Manifest, produce: Produce) -> None:
    source = {"type": "installed-docs-qa", "distributions": DISTRIBUTIONS, "max_records": 900}
    chosen = config(
        source,
        **SHARES,
        template={"kind": "prompt", "text": "{system}\nQ: {prompt}\nA: {completion}"},
        system="S",
        sequence_length=256,
    )
    made = produce(prepare_instructions, chosen, tokenizer=tokenizer, corpus=corpus)
    assert made.digest == produce(prepare_instructions, chosen, tokenizer=tokenizer, corpus=corpus).digest
    said = list(read_conversations(made, "train"))
    assert [message["role"] for message in said[0]["messages"]] == ["system", "user", "assistant"]
    assert made.counts["train_conversations"] > made.counts["test_conversations"] > 0
    assert made.counts["train_rows"] < made.counts["train_conversations"]
