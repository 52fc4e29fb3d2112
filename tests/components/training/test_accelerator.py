"""Choosing the device: what is absent is named with what is present."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from modelmill.components.core.errors import UserError
from modelmill.components.training.accelerator import present, select_accelerator

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


def test_a_precision_the_device_does_not_do_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.precision: 'bf16-stochastic' .* use fp32 or bf16-mixed"):
        select_accelerator("cpu", 1, "bf16-stochastic")


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
    try:
        select_accelerator("neuron", 8)
    except UserError as error:
        print(error)
"""


def test_a_neuron_device_is_found_through_torchs_own_hooks() -> None:
    command = [sys.executable, "-c", textwrap.dedent(NEURON)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.strip().splitlines()
    assert found == "4 neuron cpu"
    assert "8 processes and 4 neuron devices; use 4 processes" in refused
