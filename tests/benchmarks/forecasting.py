"""How fast series are forecast and made against upstream, and whether tuning pays, over several seeds.

    python -m tests.benchmarks.forecasting [--rounds 5] [--seeds 3] [--width 256]

1. `predict_vs_upstream_1024_series`: seconds of chronos-forecasting's own `Chronos2Pipeline.predict_quantiles` over
   ours, each with its default batch of 256, for 1024 series of 64 to 2048 points (evenly on a log scale, shuffled, as
   real collections mix them). A Chronos-2 of the published shape (patches of 16, 21 quantiles, 64 values a head) with
   random weights, smaller than the published one. The same for 1024 series of one length is printed beside it.
   `max_forecast_difference`: largest difference of any of the 21 quantiles, in standard deviations of its series.
2. `kernel_synthesis_vs_upstream`: seconds a series of 1024 points from KernelSynth as published
   (`_kernel_synth_peer`) over ours; both draw from one bank of kernels, whose Gram matrices are compared first.
3. `fev_metric_difference`: largest relative difference of any metric of the backtest from that of `fev`.
4. `tuned_vs_untuned`, `tuned_vs_seasonal_naive`: scaled quantile loss of `laptop/chronos-demo`'s tuned model over that
   of the same model untuned and over Seasonal Naive, on the windows held back; the worst of all seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.weights import weights_digest
from modelmill.components.forecasting.forecast_config import ChronosUseConfig
from modelmill.components.forecasting.forecast_model import open_forecaster
from modelmill.components.forecasting.kernels import BANK, KernelSampler, draw_composition
from modelmill.components.forecasting.series_table import Context
from tests.benchmarks import _fev_peer
from tests.benchmarks import _kernel_synth_peer as kernel_peer

LEVELS = [0.01, *(round(0.05 * number, 2) for number in range(1, 20)), 0.99]
SERIES, HORIZON, LENGTH = 1024, 24, 1024
PACKAGES = ("torch", "chronos-forecasting", "transformers", "scikit-learn", "numpy", "scipy", "fev")
_SHOWN = ("sql", "relative_sql", "coverage_80", "passed", "p_value")
Ratios = dict[str, list[float]]


def model_folder(folder: Path, width: int) -> Manifest:
    """A Chronos-2 of the published shape but for its width and depth, with random weights."""
    from chronos.chronos2 import Chronos2Model
    from chronos.chronos2.config import Chronos2CoreConfig

    torch.manual_seed(0)
    settings = {
        "context_length": 8192,
        "output_patch_size": 16,
        "input_patch_size": 16,
        "input_patch_stride": 16,
        "quantiles": LEVELS,
        "use_reg_token": True,
        "use_arcsinh": True,
        "max_output_patches": 64,
        "time_encoding_scale": 8192,
    }
    sizes = {"d_model": width, "d_kv": 64, "d_ff": 4 * width, "num_layers": 6, "num_heads": width // 64}
    config = Chronos2CoreConfig(**sizes, chronos_config=settings, chronos_pipeline_class="Chronos2Pipeline")
    config.architectures = ["Chronos2Model"]
    Chronos2Model(config).save_pretrained(folder / "model")
    manifest = Manifest.describe(folder, kind="model")
    manifest.metadata["weights_digest"] = weights_digest(folder / "model")
    return manifest


def make_series(lengths: Sequence[int]) -> list[np.ndarray]:
    """Seasonal walks of different sizes, float64."""
    random = np.random.default_rng(7)
    made = []
    for length in lengths:
        season = np.sin(np.arange(length) * 2 * np.pi / random.choice([7, 12, 24, 52]))
        walk = np.cumsum(random.normal(0, 0.2, length))
        made.append(10.0 ** random.uniform(-1, 3) * (5 + season + walk))
    return made


def compare_forecasts(manifest: Manifest, rounds: int) -> tuple[Ratios, float]:
    """Seconds of upstream over ours, a round each, and the largest difference of a quantile."""
    from chronos import Chronos2Pipeline

    random = np.random.default_rng(0)
    mixed = np.exp(random.uniform(np.log(64), np.log(2048), SERIES)).astype(int)
    upstream = Chronos2Pipeline.from_pretrained(manifest.uri + "/model", device_map="cpu", dtype=torch.float32)
    ours = open_forecaster(manifest, ChronosUseConfig(device="cpu"))
    ratios: Ratios = {}
    largest = 0.0
    for name, lengths in {"lengths mixed": mixed, "one length": np.full(SERIES, 512)}.items():
        values = make_series(lengths.tolist())
        contexts = [Context(str(number), each) for number, each in enumerate(values)]
        inputs = [torch.from_numpy(each).to(torch.float32) for each in values]

        def theirs(inputs: list[torch.Tensor] = inputs) -> np.ndarray:
            found, _ = upstream.predict_quantiles(inputs, prediction_length=HORIZON, quantile_levels=LEVELS)
            return torch.stack(found)[:, 0].numpy()

        def mine(contexts: list[Context] = contexts) -> np.ndarray:
            return ours.predict(contexts, HORIZON, LEVELS)

        spread = np.array([each.std() for each in values])[:, None, None]
        # Random weights give quantiles that cross; upstream leaves them so, we put them in order.
        difference = float(np.abs((mine() - np.sort(theirs(), axis=-1)) / spread).max())
        print(f"{name}: largest difference {difference:.2e} standard deviations of a series", flush=True)
        largest = max(largest, difference)
        ratios[name] = race(f"{SERIES} series, {name}", theirs, mine, rounds)
    return ratios, largest


def race(what: str, theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of theirs over ours in turns, another one first every round."""
    ratios = []
    for number in range(rounds):
        taken = {run: seconds(run) for run in ((ours, theirs) if number % 2 else (theirs, ours))}
        ratios.append(taken[theirs] / taken[ours])
        print(f"{what}, round {number + 1}: ours {taken[ours]:.2f} s, upstream {taken[theirs]:.2f} s", flush=True)
    return ratios


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare_synthesis(rounds: int, count: int = 6) -> list[float]:
    """Seconds of KernelSynth as published over ours, a series each; ours makes a hundred times as many."""
    times = np.linspace(0, 1, LENGTH)[:, None]
    theirs = {str(kernel): kernel for kernel in kernel_peer.bank(LENGTH)}
    expected = sorted(float(np.abs(kernel(times)).sum()) for kernel in theirs.values())
    found = sorted(float(np.abs(kernel.gram(LENGTH)).sum()) for kernel in set(BANK))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    many, ratios = 100 * count, []
    for number in range(rounds):
        random = np.random.RandomState(number)
        generator = np.random.default_rng(number)

        def published(random: np.random.RandomState = random) -> None:
            for _ in range(count):
                kernel_peer.generate(random, LENGTH)

        def ours(generator: np.random.Generator = generator) -> None:
            sampler = KernelSampler(LENGTH)
            for _ in range(many):
                sampler.sample(draw_composition(generator, 5), generator)

        taken = {run: seconds(run) for run in ((ours, published) if number % 2 else (published, ours))}
        mine, other = taken[ours] / many, taken[published] / count
        ratios.append(other / mine)
        print(
            f"synthesis, round {number + 1}: ours {mine * 1e3:.2f} ms, published {other * 1e3:.0f} ms a series",
            flush=True,
        )
    return ratios


def run_demo(seed: int) -> dict[str, float]:
    """Run the demo with other seeds in a home of its own; scaled quantile loss of each contestant."""
    settings = [f"{part}.seed={seed}" for part in ("synthesis", "pretraining", "tuning")]
    command = [sys.executable, "-m", "modelmill.pipelines.cli", "run", "laptop/chronos-demo"]
    command += [word for setting in settings for word in ("--set", setting)]
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(command, env={**os.environ, "MODELMILL_HOME": home}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"seed {seed}: {done.stdout}\n{done.stderr}")
        metrics = {}
        for step in ("backtest_base", "backtest_tuned", "gate"):
            (path,) = Path(home, "store", step).glob("*/manifest.json")
            metrics |= {f"{step}.{name}": value for name, value in Manifest.read(path).metrics.items()}
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="of the demo; 0 leaves it out")
    parser.add_argument("--width", type=int, default=256, help="of the Chronos-2; the published one has 768")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in PACKAGES))
    with tempfile.TemporaryDirectory() as folder:
        ratios, difference = compare_forecasts(model_folder(Path(folder), arguments.width), arguments.rounds)
    ratios["synthesis"] = compare_synthesis(arguments.rounds)
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
    figures = {
        "predict_vs_upstream_1024_series": statistics.median(ratios["lengths mixed"]),
        "max_forecast_difference": difference,
        "kernel_synthesis_vs_upstream": statistics.median(ratios["synthesis"]),
        "fev_metric_difference": _fev_peer.fev_metric_difference(),
    }
    demos = [run_demo(1234 + number) for number in range(arguments.seeds)]
    for number, metrics in enumerate(demos):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name.split(".")[1] in _SHOWN)
        print(f"demo, seed {1234 + number}: {shown}", flush=True)
    if demos:
        figures |= {
            "tuned_vs_untuned": max(each["backtest_tuned.sql"] / each["backtest_base.sql"] for each in demos),
            "tuned_vs_seasonal_naive": max(each["backtest_tuned.relative_sql"] for each in demos),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
