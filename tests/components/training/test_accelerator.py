"""Choosing the device: what is absent is named with what is present."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.training.accelerator import present, select_accelerator
from modelmill.components.training.config import Precision
from modelmill.components.training.float8 import float8_works
from modelmill.components.training.launch import LocalLauncher
from tests.components.training.samples import training_config

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_the_cpu_is_always_there_and_serves_any_number_of_processes() -> None:
    assert "cpu" in present()
    assert select_accelerator("cpu", 64).name == "cpu"


@without_cuda
def test_naming_an_absent_device_lists_what_is_present() -> None:
    with pytest.raises(UserError, match=r"training\.accelerator: 'cuda' is not in this machine; present: cpu$"):
        select_accelerator("cuda", 1)


@without_cuda
def test_auto_falls_back_to_the_cpu() -> None:
    assert select_accelerator("auto", 2, "bf16-mixed").name == "cpu"


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-stochastic"])
def test_a_cpu_computes_in_software_what_it_has_no_instructions_for(precision: Precision) -> None:
    assert select_accelerator("cpu", 1, precision).name == "cpu"


def test_a_precision_the_device_lacks_is_refused_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    float8_works.cache_clear()
    try:
        with pytest.raises(UserError) as caught:
            LocalLauncher().check(training_config(precision="fp8-mixed"))  # before any process starts
    finally:
        float8_works.cache_clear()
    assert str(caught.value) == (
        "training.precision: 'fp8-mixed' is not to be had on cpu in this machine;"
        " use fp32, bf16-mixed, bf16-stochastic"
    )


@pytest.mark.parametrize(("precision", "switch"), [("bf16-stochastic", "1"), ("bf16-mixed", "0")])
def test_neuron_hardware_rounds_stochastically_in_that_precision_only(precision: Precision, switch: str) -> None:
    environment = LocalLauncher()._environment(training_config(precision=precision, seed=3))
    assert environment["NEURON_RT_STOCHASTIC_ROUNDING_EN"] == switch
    assert environment["NEURON_RT_STOCHASTIC_ROUNDING_SEED"] == "3"


def test_fp8_is_offered_where_its_products_work() -> None:
    assert ("fp8-mixed" in select_accelerator("cpu", 1).precisions()) is float8_works("cpu")


# A device renamed to "neuron" and a module with what torch asks of one, in a process of its own: torch keeps the name.
NEURON = """
    import sys, types, torch

    module = types.ModuleType("torch.neuron")
    module.is_available = lambda: True
    module.device_count = lambda: 4
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    torch.utils.rename_privateuse1_backend("neuron")
    torch._register_device_module("neuron", module)
    from modelmill.components.core.errors import UserError
    from modelmill.components.training.accelerator import present, select_accelerator

    print(present().get("neuron"), select_accelerator("auto", 2).name, select_accelerator("auto", 8).name)
    for processes, precision in ((8, "fp32"), (1, "fp8-mixed")):
        try:
            select_accelerator("neuron", processes, precision)
        except UserError as error:
            print(error)
    print(select_accelerator("neuron", 1, "bf16-stochastic").name)
"""


def test_a_neuron_device_is_found_through_torchs_own_hooks() -> None:
    command = [sys.executable, "-c", textwrap.dedent(NEURON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, refused, narrow, stochastic = done.stdout.strip().splitlines()
    assert found == "4 neuron cpu"
    assert "8 processes and 4 neuron devices; use 4 processes" in refused
    assert "'fp8-mixed' is not to be had on neuron in this machine; use fp32, bf16-mixed, bf16-stochastic" in narrow
    assert stochastic == "neuron"
