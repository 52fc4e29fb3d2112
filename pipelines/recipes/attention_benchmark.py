"""The recipe of the `attention_benchmark` pipeline."""

from __future__ import annotations

from typing import Literal

from modelmill.components.core.recipe import PlannedStep, Recipe
from modelmill.components.llama.attention_config import AttentionBenchmarkConfig


class AttentionBenchmarkRecipe(Recipe):
    """Compare the attention kernels of a machine: time, memory and error."""

    pipeline: Literal["attention_benchmark"]
    benchmark: AttentionBenchmarkConfig

    def headline(self) -> list[str]:
        kernels = ("flash3", "cudnn", "flash", "flex", "varlen", "efficient", "math")
        return [
            *(f"benchmark_attention.{kernel}_tflops" for kernel in kernels),
            "benchmark_attention.incoherence_error_ratio",
        ]

    def steps(self) -> list[PlannedStep]:
        function = "modelmill.components.llama.benchmark_attention:benchmark_attention"
        return [PlannedStep("benchmark_attention", self.benchmark, function)]
