"""Training a Chronos: its windows, what it learns, and that neither processes nor an end in the middle matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from chronos import BaseChronosPipeline, ChronosBoltPipeline
from safetensors.numpy import load_file

from modelmill.components.core.errors import UserError
from modelmill.components.core.manifest import Manifest
from modelmill.components.core.recipe import validate
from modelmill.components.core.step import section
from modelmill.components.core.weights import weights_digest
from modelmill.components.forecasting import component
from modelmill.components.forecasting.chronos2_config import Chronos2TuneConfig
from modelmill.components.forecasting.chronos_objective import BoltTraining, training_of
from modelmill.components.forecasting.chronos_train_config import ChronosTrainConfig
from modelmill.components.forecasting.chronos_windows import Windows
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.series_table import SeriesTable, open_series
from modelmill.components.forecasting.train_chronos import train, train_chronos
from modelmill.components.forecasting.tune_chronos2 import tune_chronos2
from modelmill.components.training.accelerator import CPU
from modelmill.components.training.launch import LAUNCHED_VARIABLE, TrainingJob, TrainingResult
from modelmill.components.training.mesh import Mesh
from modelmill.components.training.worker import RankContext, StopRequestedError, StopSignal
from tests.components.forecasting import chronos_models as models

SMALL = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "context_length": 32}
SMALL |= {"prediction_length": 8, "patch_size": 4}
TRAINING: dict[str, Any] = {
    "steps": 6,
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "parallel": {"processes_per_node": 1},
    "learning_rate": 1e-2,
    "min_learning_rate": 0.0,
    "accelerator": "cpu",
    "threads_per_process": 1,
    "log_every": 1,
    "validate_every": None,
    "checkpoint_every": 2,
}


def waves(count: int = 12, length: int = 120) -> list[np.ndarray]:
    """Sines of a few periods with a little noise: easy to learn."""
    random = np.random.default_rng(0)
    return [
        np.sin(np.arange(length) * 2 * np.pi / (4 + number % 3 * 4) + number) * 5 + random.normal(size=length) * 0.2
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return models.series_manifest(tmp_path_factory.mktemp("waves"), waves(), horizon=8, windows=1)


def config(*, model: Any = SMALL, **changes: Any) -> ChronosTrainConfig:
    window = {name: changes.pop(name) for name in ("horizon", "min_context", "short_contexts") if name in changes}
    return ChronosTrainConfig.model_validate({"model": model, "training": {**TRAINING, **changes}, **window})


class StopAfter(StopSignal):
    """A request to stop that comes with a step."""

    def __init__(self, step: int | None) -> None:
        super().__init__(1)
        self._left = step

    def requested(self) -> bool:
        if self._left is not None:
            self._left -= 1
        return self._left is not None and self._left <= 0


class Here:
    """A launcher that trains in this process, as the one rank of a job."""

    def __init__(self, stop_after: int | None = None) -> None:
        self._stop = StopAfter(stop_after)

    def check(self, training: Any) -> None:
        pass

    def launch(self, job: TrainingJob) -> TrainingResult:
        mesh = cast(Mesh, SimpleNamespace(data_rank=0, data_degree=1, tensor=1, shard=1, device_mesh=None))
        ranks = RankContext(0, 1, mesh, torch.device("cpu"), CPU(), self._stop, job.scratch)
        return train(ranks, json.loads(json.dumps(job.spec)), job.training)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process group of this process alone."""
    monkeypatch.setenv(LAUNCHED_VARIABLE, "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(scratch: Path, chosen: ChronosTrainConfig, series: Manifest, launcher: Any = None, **inputs: Any) -> Manifest:
    output = scratch / "data"
    output.mkdir(parents=True, exist_ok=True)
    result = train_chronos(chosen, output, series=series, launcher=launcher, **inputs)
    return Manifest.describe(
        output, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


def history(model: Manifest) -> list[dict[str, float]]:
    return [json.loads(line) for line in model.path("history.jsonl").read_text().splitlines()]


class TestWindows:
    def windows(self, series: Manifest, **changes: Any) -> Windows:
        settings = {"context_length": 32, "horizon": 8, "min_context": 4, "short_contexts": 0.5, "hold_out": True}
        return Windows(open_series(series), **{**settings, "seed": 3, "global_batch_size": 12, **changes})

    def test_a_batch_is_a_function_of_seed_and_step_whatever_the_ranks(self, series: Manifest) -> None:
        windows = self.windows(series)
        whole = windows.batch(5)
        assert whole.shape == (12, 40)
        assert np.array_equal(self.windows(series).batch(5), whole, equal_nan=True)
        shared = np.concatenate([windows.batch(5, rank, 3) for rank in range(3)])
        assert np.array_equal(shared, whole, equal_nan=True)
        assert not np.array_equal(windows.batch(6), whole, equal_nan=True)
        assert not np.array_equal(self.windows(series, seed=4).batch(5), whole, equal_nan=True)

    def test_contexts_are_standardised_and_of_many_lengths(self, series: Manifest) -> None:
        rows = np.concatenate([self.windows(series).batch(step) for step in range(20)])
        contexts = rows[:, :32]
        np.testing.assert_allclose(np.nanmean(contexts, axis=1), 0, atol=1e-9)
        np.testing.assert_allclose(np.nanstd(contexts, axis=1), 1, atol=1e-9)
        lengths = (~np.isnan(contexts)).sum(axis=1)
        assert lengths.min() < 8
        assert (lengths == 32).mean() > 0.3
        assert not np.isnan(rows[:, 32:]).any()

    def test_what_is_held_back_is_never_read(self, tmp_path: Path) -> None:
        """Series whose held-back points are spikes: none may show."""
        values = waves(4, 80)
        for item in values:
            item[-24:] = 1e9  # two windows of 8 for the backtest, 8 for validation
        series = models.series_manifest(tmp_path, values, horizon=8, windows=2)
        windows = self.windows(series)
        rows = np.concatenate([windows.batch(step) for step in range(30)])
        assert np.nanmax(np.abs(rows)) < 100
        held = windows.validation(3)
        assert held.shape == (3, 40)
        assert (held[:, 32:] > 1e6).all(), "validation is what training does not see"
        assert (np.abs(held[:, :32]) < 100).all()
        spiked = np.concatenate([self.windows(series, hold_out=False).batch(step) for step in range(30)])
        assert np.nanmax(np.abs(spiked)) > 1e6

    def test_a_constant_context_teaches_nothing(self, tmp_path: Path) -> None:
        values = np.concatenate([np.full(60, 1e6), np.arange(20.0)])
        windows = self.windows(models.series_manifest(tmp_path, [values]), short_contexts=0.0, hold_out=False)
        rows = np.concatenate([windows.batch(step) for step in range(10)])
        flat = np.nanstd(rows[:, :32], axis=1) < 1e-6
        assert flat.any()
        assert np.isnan(rows[flat, 32:]).all()
        assert np.isfinite(rows[~flat, 32:]).any()

    def test_short_series_are_left_out_or_refused(self, tmp_path: Path) -> None:
        values = [np.arange(9.0), np.arange(30.0), np.arange(14.0)]
        series = models.series_manifest(tmp_path, values)
        assert self.windows(series).usable.tolist() == [1, 2]
        with pytest.raises(UserError, match=r"chronos\.min_context: 40, but no series has 41 points.*longest has 30"):
            self.windows(series, min_context=40)
        rows = self.windows(series, hold_out=False, horizon=20).batch(0)
        assert np.isnan(rows[:, 32:]).any(), "a target may be shorter than the horizon"


class TestObjectives:
    def windows(self, series: Manifest, horizon: int = 8) -> Windows:
        table = SeriesTable(open_series(series).path)
        return Windows(
            table,
            context_length=32,
            horizon=horizon,
            min_context=4,
            short_contexts=0.5,
            hold_out=False,
            seed=0,
            global_batch_size=6,
        )

    @pytest.mark.parametrize("horizon", [8, 5])
    def test_bolts_loss_is_the_quantile_loss(self, series: Manifest, tmp_path: Path, horizon: int) -> None:
        pipeline = BaseChronosPipeline.from_pretrained(Path(models.bolt(tmp_path).uri) / "model")
        windows = self.windows(series, horizon)
        module, batches = training_of("chronos-bolt", pipeline.model, windows)
        assert isinstance(module, BoltTraining)
        rows = windows.batch(0)
        found = module(torch.from_numpy(batches.batch(0, 0, 1))).item()
        predicted = pipeline.predict(torch.from_numpy(rows[:, :32]).float()).numpy()[:, :, :horizon]
        error = rows[:, None, 32:] - predicted
        levels = np.array(models.LEVELS)[:, None]
        expected = 2 * np.maximum(levels * error, (levels - 1) * error)
        assert found == pytest.approx(expected.mean(axis=(1, 2)).sum(), rel=1e-4)

    def test_t5s_loss_is_that_of_transformers(self, series: Manifest, tmp_path: Path) -> None:
        pipeline = BaseChronosPipeline.from_pretrained(Path(models.t5(tmp_path).uri) / "model")
        windows = self.windows(series)
        module, batches = training_of("chronos-t5", pipeline, windows)
        rows = torch.from_numpy(windows.batch(0)).float()
        tokens, mask, scale = pipeline.tokenizer.context_input_transform(rows[:, :32])
        labels, present = pipeline.tokenizer.label_input_transform(rows[:, 32:], scale)
        loss = pipeline.inner_model(
            input_ids=tokens, attention_mask=mask, labels=labels.masked_fill(~present, -100)
        ).loss
        found = module(torch.from_numpy(batches.batch(0, 0, 1))).item()
        assert found == pytest.approx(loss.item() * 6 * 9 / 8, rel=1e-4)

    def test_windows_without_a_target_add_nothing(self, series: Manifest, tmp_path: Path) -> None:
        rows = self.windows(series).batch(0)
        rows[0, 32:] = np.nan
        for family, make in (("chronos-bolt", models.bolt), ("chronos-t5", models.t5)):
            pipeline = BaseChronosPipeline.from_pretrained(Path(make(tmp_path / family).uri) / "model")
            source = pipeline.model if family == "chronos-bolt" else pipeline
            module, batches = training_of(cast(Any, family), source, self.windows(series))
            module.eval()
            whole, rest = (module(torch.from_numpy(batches.encode(part.copy()))).item() for part in (rows, rows[1:]))
            assert whole == pytest.approx(rest, rel=1e-4)


@pytest.fixture(scope="module")
def trained(series: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Trained long enough to know a sine, by the launcher."""
    sizes = {"global_batch_size": 16, "micro_batch_size": 16, "learning_rate": 2e-2, "weight_decay": 0.01}
    times = {"steps": 250, "validate_every": 125, "checkpoint_every": None, "log_every": 10}
    chosen = config(model={**SMALL, "initializer_factor": 0.3}, min_context=16, **sizes, **times)
    return run(tmp_path_factory.mktemp("trained"), chosen, series)


class TestResult:
    def test_it_learns_and_the_library_loads_it(self, trained: Manifest, series: Manifest) -> None:
        losses = [record["loss"] for record in history(trained) if "loss" in record]
        assert np.mean(losses[-3:]) < 0.6 * losses[0]
        validation = [record["validation_loss"] for record in history(trained) if "validation_loss" in record]
        assert len(validation) == 2
        assert validation[-1] < 0.6 * losses[0]
        pipeline = BaseChronosPipeline.from_pretrained(Path(trained.uri) / "model")
        assert isinstance(pipeline, ChronosBoltPipeline)
        table = open_series(series)
        contexts = [table.context(number, table.origins(number)[0]) for number in range(len(table))]
        found = open_forecaster(trained, ChronosUseConfig(device="cpu")).predict(contexts, 8, [0.5])[..., 0]
        actual = np.stack([table.actual(number, table.origins(number)[0]) for number in range(len(table))])
        assert np.abs(found - actual).mean() < 0.7 * np.abs(actual).mean()

    def test_the_manifest_says_what_it_is(self, trained: Manifest, series: Manifest) -> None:
        assert trained.kind == "model"
        assert trained.metadata == {
            "flavor": "forecaster",
            "family": "chronos-bolt",
            "method": "scratch",
            "weights_digest": weights_digest(Path(trained.uri) / "model"),
            "dataset_digest": series.digest,
        }
        expected = {"steps": 250, "windows": 4000, "series": 12, "world_size": 1}
        assert {name: trained.counts[name] for name in expected} == expected

    def test_no_file_names_a_place(self, trained: Manifest, tmp_path: Path) -> None:
        for entry in trained.files:
            assert str(tmp_path.parent.parent).encode() not in trained.path(entry.path).read_bytes(), entry.path


@pytest.mark.parametrize("family", ["bolt", "t5"])
def test_a_base_is_tuned_and_becomes_better(one_rank: Any, series: Manifest, tmp_path: Path, family: str) -> None:
    base = getattr(models, family)(tmp_path / "base")
    chosen = config(model=None, steps=30, learning_rate=3e-3)
    tuned = run(tmp_path / "tuned", chosen, series, Here(), base=base)
    assert tuned.metadata["base_digest"] == base.metadata["weights_digest"]
    assert tuned.metadata["method"] == "full"
    assert tuned.metadata["weights_digest"] != base.metadata["weights_digest"]
    losses = [record["loss"] for record in history(tuned) if "loss" in record]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    kept = [json.loads(Path(model.uri, "model", "config.json").read_text()) for model in (base, tuned)]
    assert kept[0]["chronos_config"] == kept[1]["chronos_config"]
    open_forecaster(tuned, ChronosUseConfig(device="cpu")).predict(models.contexts(models.walks(1)), 4, [0.5])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_stopped_and_resumed_is_undisturbed(one_rank: Any, series: Manifest, tmp_path: Path, dropout: float) -> None:
    chosen = config(model={**SMALL, "dropout": dropout})
    whole = run(tmp_path / "whole", chosen, series, Here())
    with pytest.raises(StopRequestedError, match="after step 3 of 6"):
        run(tmp_path / "stopped", chosen, series, Here(stop_after=3))
    resumed = run(tmp_path / "stopped", chosen, series, Here())
    assert history(resumed) == history(whole)
    assert resumed.digest == whole.digest


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"model": {"d_model": 30, "num_heads": 4}}, "num_heads: 4 do not share d_model 30 evenly"),
            ({"model": {"context_length": 50}}, "context_length: 50 is no multiple of patch_size 16"),
            ({"model": {"quantiles": [0.1, 0.9]}}, r"quantiles: \[0\.1, 0\.9\] must rise"),
            ({"model": {"depth": 1}}, "depth"),
            ({"training": {**TRAINING, "parallel": {"processes_per_node": 2, "tensor": 2}}}, "splits our own decoder"),
            ({"training": {**TRAINING, "document_masking": True}}, "a Chronos has its own attention"),
        ],
        ids=["heads", "patch", "levels", "unknown", "tensor", "documents"],
    )
    def test_sections(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(UserError, match=words):
            validate(ChronosTrainConfig, {"training": TRAINING, **fields})

    def test_inputs_that_do_not_fit(self, series: Manifest, tmp_path: Path) -> None:
        base = models.bolt(tmp_path / "bolt")
        with pytest.raises(UserError, match=r"chronos\.model: neither sizes nor a base are given"):
            run(tmp_path, config(model=None), series)
        with pytest.raises(UserError, match=r"chronos\.model: sizes and a base are both given"):
            run(tmp_path, config(), series, base=base)
        with pytest.raises(UserError, match="base: a Chronos-2 is tuned by the method of its library"):
            run(tmp_path, config(model=None), series, base=models.chronos2(tmp_path / "two"))
        with pytest.raises(UserError, match=r"chronos\.horizon: 9 is more than the 8 points"):
            run(tmp_path, config(model=None, horizon=9), series, base=base)
        with pytest.raises(UserError, match="is of kind 'model'"):
            run(tmp_path, config(), base)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 2])
def test_two_processes_have_the_trajectory_of_one(series: Manifest, tmp_path: Path, shard: int) -> None:
    layouts = [{"processes_per_node": 1}, {"processes_per_node": 2, "shard": shard}]
    settings = {"micro_batch_size": 4, "validate_every": 3}
    runs = [
        run(tmp_path / str(number), config(parallel=layout, **settings), series)
        for number, layout in enumerate(layouts)
    ]
    losses = [[record.get("loss", record.get("validation_loss")) for record in history(model)] for model in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = [load_file(model.path("model/model.safetensors")) for model in runs]
    assert weights[0].keys() == weights[1].keys()


@pytest.mark.slow
def test_the_shells_train_and_tune(series: Manifest, tmp_path: Path) -> None:
    def paths(*names: str) -> list[Any]:
        return [SimpleNamespace(path=str(tmp_path / name)) for name in names]

    series.write(tmp_path / "series")
    text = section("train_chronos", config(steps=2), train_chronos)
    component.train_chronos.python_func(text, *paths("series", "trained"))
    text = section("train_chronos", config(model=None, steps=1), train_chronos)
    component.train_chronos.python_func(text, *paths("series", "tuned"), base=paths("trained")[0])
    trained, tuned = (Manifest.read(tmp_path / name) for name in ("trained", "tuned"))
    assert tuned.metadata["base_digest"] == trained.metadata["weights_digest"]
    models.chronos2(tmp_path / "two").write(tmp_path / "chronos2")
    settings = Chronos2TuneConfig(steps=1, validate_every=None, device="cpu")
    text = section("tune_chronos2", settings, tune_chronos2)
    component.tune_chronos2.python_func(text, *paths("series", "chronos2", "better"))
    assert Manifest.read(tmp_path / "better").metadata["family"] == "chronos-2"


_PROGRAM = """
import sys
from pathlib import Path
from modelmill.components.core.manifest import Manifest
from modelmill.components.forecasting.chronos_train_config import ChronosTrainConfig
from modelmill.components.forecasting.train_chronos import train_chronos
folder = Path(sys.argv[1])
config = ChronosTrainConfig.model_validate_json((folder / "config.json").read_text())
train_chronos(config, folder / "data", series=Manifest.read(folder / "series"))
"""


@pytest.mark.slow
def test_killed_and_resumed_is_undisturbed(series: Manifest, tmp_path: Path) -> None:
    chosen = config(steps=300, checkpoint_every=20)
    whole = run(tmp_path / "whole", chosen, series)
    folder = tmp_path / "killed"
    (folder / "data").mkdir(parents=True)
    series.write(folder / "series")
    (folder / "config.json").write_text(chosen.model_dump_json())
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(folder)], start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*/checkpoint.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = run(folder, chosen, series)
    assert history(resumed) == history(whole)
    assert resumed.digest == whole.digest
