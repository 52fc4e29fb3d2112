"""Where the trials of a search are kept, by Optuna: a SQLite file, or a database that several machines share.

A search goes on from what its storage holds. For that to end as it would have undisturbed, the values of a trial are a
function of the seed, the trial's number and the trials that are finished: Optuna's own samplers carry a random state
from trial to trial, which a killed process takes with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import json_digest
from modelmill.components.core.mlflow_store import one_line, safe_uri
from modelmill.components.forecasting.search_config import Params, SearchConfig

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import RDBStorage

STORAGE_VARIABLE = "MODELMILL_SEARCH_STORAGE"  # SQLAlchemy URL; it may hold a password, so no recipe and no log has it
_IDENTITY = "modelmill.identity"
_CONNECT_SECONDS = 10
_ATTEMPTS = 8  # to open a database whose tables another worker is making


def open_study(config: SearchConfig, identity: str, fallback: Path) -> Study:
    """The search of a section in its storage, made if there is none.

    Args:
        config: of the search.
        identity: `SearchConfig.identity`.
        fallback: SQLite file that is used where `MODELMILL_SEARCH_STORAGE` names no database.

    Raises:
        UserError: the storage cannot be used, or holds another search of that name.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = os.environ.get(STORAGE_VARIABLE)
    address = _with_driver(url) if url else f"sqlite:///{fallback.absolute()}"
    name = config.study or f"modelmill-{identity[:16]}"
    # A driver that is missing and a port that is no number are neither Optuna's nor SQLAlchemy's own errors.
    with storage_errors(ImportError, ValueError):
        storage = _open_storage(address)
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            sampler=make_sampler(config),
            pruner=_make_pruner(config),
            load_if_exists=True,
        )
        held = study.user_attrs.get(_IDENTITY)
        if held is None and not study.trials:
            study.set_user_attr(_IDENTITY, identity)
        elif held != identity:
            raise UserError(
                f"search.study: the storage holds another search named {study.study_name!r}, of another seed, space,"
                " training, base or series; choose another name, or leave it out"
            )
    return study


def _open_storage(address: str) -> RDBStorage:
    """The database with Optuna's tables; workers that begin at once all try to make them, and one wins."""
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import DBAPIError

    for attempt in range(_ATTEMPTS):
        try:
            return RDBStorage(address, engine_kwargs=_engine_options(address))
        except DBAPIError as error:
            made_meanwhile = any(
                words in str(error.orig).lower() for words in ("already exists", "duplicate", "unique")
            )
            if not made_meanwhile or attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.3 * (attempt + 1))
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def storage_errors(*others: type[Exception]) -> Iterator[None]:
    """Turn what a storage raises into one line without the password.

    Args:
        others: what else it may raise here.

    Raises:
        UserError: the storage cannot be used.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    kinds: tuple[type[Exception], ...] = (StorageInternalError, SQLAlchemyError, *others)
    try:
        yield
    except kinds as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        url = os.environ.get(STORAGE_VARIABLE, "")
        reason = one_line(getattr(cause, "orig", None) or cause)
        for secret in filter(None, (url, _password(url))):
            reason = reason.replace(secret, "...")
        where = _shown(url) if url else "the search's own file"
        raise UserError(
            f"{STORAGE_VARIABLE}: {where} cannot be used ({reason}); start it or correct the URL"
        ) from None


def _password(url: str) -> str:
    try:
        return urlsplit(url).password or ""
    except ValueError:
        return ""


def _shown(url: str) -> str:
    """The URL without user, password and options, which may hold one too."""
    try:
        return urlunsplit(urlsplit(safe_uri(url))._replace(query="", fragment=""))
    except ValueError:
        return "its URL"


def _with_driver(url: str) -> str:
    """A PostgreSQL URL that names its driver: which one SQLAlchemy takes unasked depends on its version.

    Raises:
        UserError: there is none.
    """
    scheme, colon, rest = url.partition("://")
    if not colon:
        raise UserError(f"{STORAGE_VARIABLE}: it is no URL; write postgresql://user:password@host/database")
    if scheme not in ("postgresql", "postgres"):
        return url
    for driver in ("psycopg", "psycopg2"):
        if find_spec(driver) is not None:
            return f"postgresql+{driver}://{rest}"
    raise UserError(f"{STORAGE_VARIABLE}: PostgreSQL needs a driver; pip install 'psycopg[binary]'")


def _engine_options(address: str) -> dict[str, Any]:
    if address.startswith("postgresql"):
        return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_SECONDS}}
    if address.startswith("sqlite"):
        return {"connect_args": {"timeout": 60}}  # another worker may be writing
    return {}


def make_sampler(config: SearchConfig) -> BaseSampler:
    """TPE (Bergstra et al. 2011, as Optuna has it), its random numbers made anew for each trial and parameter."""
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler, TPESampler
    from optuna.trial import FrozenTrial

    class NumberedSampler(BaseSampler):
        def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
            return {}

        def sample_relative(
            self, study: Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
        ) -> dict[str, Any]:
            return {}

        def sample_independent(
            self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
        ) -> Any:
            seed = int(json_digest([config.seed, trial.number, param_name])[:8], 16)
            # Workers that run at once keep away from what the others try.
            liar = config.max_parallel_jobs > 1
            tpe = TPESampler(seed=seed, n_startup_trials=config.startup_trials, constant_liar=liar)
            return tpe.sample_independent(study, trial, param_name, param_distribution)

    return NumberedSampler()


def _make_pruner(config: SearchConfig) -> BasePruner:
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    if config.pruning is None:
        return NopPruner()
    if config.pruning.pruner == "median":
        return MedianPruner(n_startup_trials=config.pruning.startup_trials)
    return HyperbandPruner(min_resource=1, max_resource=config.pruning.segments, reduction_factor=3)


def suggest(config: SearchConfig, trial: Trial) -> Params:
    """Values of a trial: those it has already, else new ones."""
    low, high = config.space.learning_rate
    params: Params = {"learning_rate": trial.suggest_float("learning_rate", low, high, log=True)}
    for name, choices in config.space.choices().items():
        params[name] = int(trial.suggest_categorical(name, choices))
    return params


def next_trial(
    study: Study, config: SearchConfig, mine: Callable[[Mapping[str, Any]], bool], worker: int
) -> Trial | None:
    """The trial a worker goes on with, a new one, or None when there are as many as asked for.

    Args:
        study: made by `open_study`.
        config: of the search.
        mine: whether attributes of a trial that a killed process left are those of a trial of this worker.
        worker: number of this worker, kept with new trials.
    """
    import optuna
    from optuna.trial import TrialState

    for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if left.number < config.max_jobs and mine(left.user_attrs):
            return optuna.trial.Trial(study, left._trial_id)
    if len(study.get_trials(deepcopy=False)) >= config.max_jobs:
        return None
    trial = study.ask()
    if trial.number >= config.max_jobs:  # another worker was faster
        study.tell(trial, state=TrialState.FAIL)
        return None
    trial.set_user_attr("worker", worker)
    return trial
