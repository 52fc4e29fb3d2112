"""The storage of a search: what values a trial gets, databases that cannot be used, and a real PostgreSQL."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting import search_storage
from modelmill.components.forecasting.search_config import Params, SearchConfig
from modelmill.components.forecasting.search_storage import (
    STORAGE_VARIABLE,
    make_sampler,
    next_trial,
    open_study,
    suggest,
)
from tests.components.forecasting import searches
from tests.components.forecasting.postgres import PASSWORD, running_server
from tests.components.forecasting.searches import Trainings, loss, run, section


@pytest.fixture(autouse=True)
def no_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)


def go_on(path: Path, config: SearchConfig, count: int) -> list[Params]:
    """Run some trials of a search as a process of its own would: it is opened anew for each."""
    tried = []
    for _ in range(count):
        study = open_study(config, "x" * 64, path)
        trial = next_trial(study, config, lambda attributes: True, 0)
        assert trial is not None
        params = suggest(config, trial)
        tried.append(params)
        study.tell(trial, loss(params["learning_rate"], params.get("steps", 8)))
    return tried


class TestValues:
    def test_are_a_function_of_the_seed_and_the_finished_trials(self, tmp_path: Path) -> None:
        config = section(space={"steps": [8, 16, 24]}, startup_trials=1)
        tried = go_on(tmp_path / "a", config, 4)
        assert go_on(tmp_path / "b", config, 3) == tried[:3]
        assert go_on(tmp_path / "c", section(seed=11, space={"steps": [8, 16, 24]}), 1) != tried[:1]
        # A trial that was cut off gets the values it would have had.
        study = open_study(config, "x" * 64, tmp_path / "b")
        trial = next_trial(study, config, lambda attributes: True, 0)
        assert trial is not None
        trial.suggest_float("learning_rate", *config.space.learning_rate, log=True)  # and killed before the other
        assert go_on(tmp_path / "b", config, 1) == tried[3:]

    def test_come_near_the_best_after_the_random_ones(self) -> None:
        config = section(max_jobs=60, startup_trials=8, space={"learning_rate": [1e-7, 1e-1]})
        study = optuna.create_study(sampler=make_sampler(config))
        rates = []
        for _ in range(60):
            trial = study.ask()
            rates.append(suggest(config, trial)["learning_rate"])
            study.tell(trial, loss(rates[-1], 8))
        near = [10**-5.4 < rate < 10**-3.4 for rate in rates]
        assert sum(near[30:]) > 20, "of 30, in a third of the scale"

    def test_there_are_as_many_as_asked_for(self, tmp_path: Path) -> None:
        config = section(max_jobs=2)
        go_on(tmp_path / "a", config, 2)
        study = open_study(config, "x" * 64, tmp_path / "a")
        assert next_trial(study, config, lambda attributes: True, 0) is None


def opened_at_once(path: Path) -> set[str]:
    """Names of a search that eight workers open at the same moment."""
    together = threading.Barrier(8)

    def begin(_: int) -> str:
        together.wait()
        return str(open_study(section(), "x" * 64, path).study_name)

    with ThreadPoolExecutor(8) as workers:
        return set(workers.map(begin, range(8)))


def test_workers_may_begin_at_once(tmp_path: Path) -> None:
    assert opened_at_once(tmp_path / "a") == {f"modelmill-{'x' * 16}"}


class TestRefusals:
    def test_a_storage_that_holds_another_search(self, tmp_path: Path) -> None:
        given = searches.inputs(tmp_path / "inputs")
        with Trainings():
            run(tmp_path / "a", section(study="sales", max_jobs=1), **given)
            for changes in ({"seed": 11}, {"space": {"learning_rate": [1e-5, 1e-3]}}, {"metric": "wql"}):
                with pytest.raises(UserError, match=r"search\.study: the storage holds another search named 'sales'"):
                    run(tmp_path / "a", section(study="sales", max_jobs=1, **changes), **given)
            run(tmp_path / "a", section(study="sales", max_jobs=2), **given)

    def test_nothing_listens(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            monkeypatch.setenv(STORAGE_VARIABLE, f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/searches?options=x")
            with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as caught:
                open_study(section(), "x" * 64, tmp_path / "a")
        assert f"{STORAGE_VARIABLE}: postgresql://127.0.0.1:{port}/searches cannot be used" in str(caught.value)
        assert PASSWORD not in str(caught.value) + caplog.text
        assert not (tmp_path / "a").exists(), "no other storage instead"

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("searches.sqlite", "it is no URL"),
            (f"nosuch://me:{PASSWORD}@host/db", "cannot be used"),
            (f"postgresql://me:{PASSWORD}@host:port/db", "cannot be used"),
            ("sqlite:////no/such/folder/a.sqlite", "cannot be used"),
            (f"mysql+nosuchdriver://me:{PASSWORD}@host/db", "cannot be used"),
        ],
    )
    def test_urls_that_lead_nowhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, message: str
    ) -> None:
        monkeypatch.setenv(STORAGE_VARIABLE, url)
        with pytest.raises(UserError, match=f"{STORAGE_VARIABLE}: .*{message}") as caught:
            open_study(section(), "x" * 64, tmp_path / "a")
        assert PASSWORD not in str(caught.value)

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("not a database" * 100)
        with pytest.raises(UserError, match=r"the search's own file cannot be used .*not a database"):
            open_study(section(), "x" * 64, tmp_path / "a")


class TestPostgresDriver:
    def test_is_named_since_what_sqlalchemy_takes_depends_on_its_version(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        present = {"psycopg", "psycopg2"}
        monkeypatch.setattr(search_storage, "find_spec", lambda name: name if name in present else None)
        assert search_storage._with_driver("postgresql://h/d") == "postgresql+psycopg://h/d"
        assert search_storage._with_driver("postgres://h/d") == "postgresql+psycopg://h/d"
        assert search_storage._with_driver("postgresql+pg8000://h/d") == "postgresql+pg8000://h/d"
        present.remove("psycopg")
        assert search_storage._with_driver("postgresql://h/d") == "postgresql+psycopg2://h/d"
        present.clear()
        with pytest.raises(UserError, match="PostgreSQL needs a driver; pip install"):
            search_storage._with_driver("postgresql://h/d")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_server() as url:
        yield url


class TestPostgres:
    @pytest.fixture
    def given(self, tmp_path: Path) -> dict[str, Manifest]:
        return searches.inputs(tmp_path / "inputs")

    def test_a_search_in_it_is_the_same_search(
        self, server: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Trainings() as trainings:
            plain = run(tmp_path / "file", section(max_jobs=3), **given)
            monkeypatch.setenv(STORAGE_VARIABLE, server)
            trainings.failures[2] = KeyboardInterrupt()  # type: ignore[assignment]
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "database", section(max_jobs=3), **given)
            trainings.failures.clear()
            found = run(tmp_path / "database", section(max_jobs=3), **given)
        assert found.digest == plain.digest
        assert not (tmp_path / "database" / "search.sqlite").exists()
        names = optuna.get_all_study_names(server.replace("postgresql://", "postgresql+psycopg://"))
        assert len(names) == 1
        assert names[0].startswith("modelmill-")

    def test_workers_may_begin_at_once(self, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        address = server.replace("postgresql://", "postgresql+psycopg://")
        with sqlalchemy.create_engine(address).connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(
                sqlalchemy.text("CREATE DATABASE fresh")
            )
        monkeypatch.setenv(STORAGE_VARIABLE, server.removesuffix("postgres") + "fresh")
        assert len(opened_at_once(tmp_path / "a")) == 1

    def test_a_wrong_password_is_not_told(self, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(STORAGE_VARIABLE, server.replace(PASSWORD, "wrong-secret"))
        with pytest.raises(UserError, match="password authentication failed") as caught:
            open_study(section(), "x" * 64, tmp_path / "a")
        assert "wrong-secret" not in str(caught.value)
