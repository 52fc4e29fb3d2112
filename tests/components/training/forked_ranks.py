"""Ranks forked from one process that has imported torch already, for tests that ask what ranks compute.

A rank that torchrun starts spends seconds on imports, most of what a test with tiny models takes. These ranks are
processes in a gloo group as well and run the same frame, `run_rank`; only the way they come to life differs.
What torchrun and the launcher do themselves is tested with the launcher, see `test_launch.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import sys
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from modelmill.components.training.launch import LocalLauncher, RankFiles, TrainingJob, TrainingResult
from modelmill.components.training.processes import PARENT_VARIABLE

PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
    "modelmill.components.llama.huggingface",
    "modelmill.components.training.loop",
    "modelmill.components.training.worker",
]


def _rank(module: str, job: str, log: str, environment: dict[str, str]) -> None:
    """What each process does, as `python -m MODULE JOB`; the module ends it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(environment, **{PARENT_VARIABLE: str(os.getppid())})

    import torch

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # read from the environment long ago, in the parent
    sys.argv = [module, job]
    sys.modules.pop(module, None)  # or runpy warns that it was imported before
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class ForkedRanks(LocalLauncher):
    """A launcher whose processes import torch once for all of them."""

    def launch(self, job: TrainingJob) -> TrainingResult:
        """Run a job to its end.

        Raises:
            RuntimeError: a rank failed; with what all of them wrote.
        """
        import torch.distributed as dist

        files, size = RankFiles(job.scratch), job.training.parallel.processes_per_node
        files.job.write_text(json.dumps({"training": job.training.model_dump(mode="json"), **job.spec}))
        # This process keeps the store the ranks meet at, so that no port has to be guessed.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared: dict[str, Any] = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": store.port}
        shared |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environment = {**self._environment(job.training), **{name: str(value) for name, value in shared.items()}}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        logs = [job.scratch / f"rank-{rank}.log" for rank in range(size)]
        ranks: list[BaseProcess] = []
        for rank, log in enumerate(logs):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(context.Process(target=_rank, args=(job.module, str(files.job), str(log), own)))
            ranks[-1].start()
        _wait_for_all(ranks)
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError("\n".join(f"{log.name}:\n{log.read_text()}" for log in logs if log.exists()))
        return TrainingResult.model_validate_json(files.result.read_bytes())


def _wait_for_all(ranks: list[BaseProcess]) -> None:
    """Until every rank has ended; the first that fails ends the others, which would wait for it."""
    try:
        while living := [rank for rank in ranks if rank.exitcode is None]:
            wait([rank.sentinel for rank in living])
            if any(rank.exitcode for rank in ranks):
                break
    finally:
        for rank in ranks:
            if rank.exitcode is None:
                rank.kill()
            rank.join()
