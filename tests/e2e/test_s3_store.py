"""A pipeline whose outputs live in S3: run, run again, and run from another machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import modelmill, states
from tests.fakes.s3_server import S3Server

REUSED = ("ingest_corpus", "train_tokenizer", "pack_tokens", "pretrain", "evaluate_heldout")


@pytest.mark.slow
def test_a_second_run_and_a_second_machine_reuse_what_lies_in_s3(s3_server: S3Server, tmp_path: Path) -> None:
    environment = s3_server.environment() | {"MODELMILL_STORE": f"s3://{s3_server.bucket()}/outputs"}
    homes = [tmp_path / "one", tmp_path / "other"]
    for home in homes:
        home.mkdir()
    first = modelmill(homes[0], "run", "laptop/llama-smoke", **environment)
    assert first.returncode == 0, first.stdout + first.stderr
    assert set(states(first.stdout).values()) == {"finished"}
    assert "report.html" in first.stdout
    assert not list((homes[0] / "home" / "store").glob("*/*/data")), "the home keeps no output"
    for home in homes:
        again = modelmill(home, "run", "laptop/llama-smoke", **environment)
        assert again.returncode == 0, again.stdout + again.stderr
        assert {step: states(again.stdout)[step] for step in REUSED} == dict.fromkeys(REUSED, "reused"), again.stdout
        assert list(home.glob("home/mlartifacts/**/report.html")), "MLflow holds the report, fetched where need be"
    plan = modelmill(homes[1], "plan", "laptop/llama-smoke", "--json", **environment)
    assert plan.returncode == 0, plan.stdout + plan.stderr
    [made] = [json.loads(path.read_text()) for path in homes[1].glob("home/store/pretrain/*/manifest.json")]
    assert made["uri"].startswith(f"{environment['MODELMILL_STORE']}/pretrain/{made['key']}/")
