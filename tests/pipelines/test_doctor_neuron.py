"""The doctor says of Neuron drivers what AWS says, and no more."""

from __future__ import annotations

import pytest

from modelmill.pipelines.doctor.neuron import _RELEASED, judge


@pytest.mark.parametrize("sdk", sorted(_RELEASED))
def test_versions_that_were_released_together_work(sdk: str) -> None:
    driver = f"{_RELEASED[sdk][1]}.28.0"
    assert judge(driver, sdk, trainium2=True)[0] == "works"


@pytest.mark.parametrize(
    ("driver", "sdk", "verdict", "words"),
    [
        # Runtime 2.32 (SDK 2.30) and old drivers.
        ("2.26.10.0", "2.30", "fails", "newer than 2.26"),
        ("2.21.37.0", "2.30", "fails", "newer than 2.26"),
        ("2.27.4.0", "2.30", "works", "enough"),
        # Driver 2.29 and old runtimes.
        ("2.29.0.0", "2.30", "fails", "driver 2.29 needs an image of SDK 2.31 or newer, and this one has 2.30"),
        ("2.29.0.0", "2.28", "fails", "this one has 2.28"),
        ("2.29.0.0", "2.31", "works", "that of SDK 2.31"),
        ("2.29.0.0", "2.32", "unknown", "older than that of SDK 2.32, 2.30"),
        ("2.30.2.0", "2.28", "unknown", "does not say"),
        # A driver works with older runtimes.
        ("2.28.0.0", "2.28", "works", "newer than that of SDK 2.28, 2.26"),
        ("2.31.7.0", "2.31", "works", "newer than that of SDK 2.31, 2.29"),
        # Not said by anybody.
        ("2.24.7.0", "2.28", "unknown", "older than that of SDK 2.28, 2.26"),
        ("2.32.0.0", "2.33", "unknown", "not known here"),
        ("2.31.7.0", "2.34", "unknown", "which driver SDK 2.34 needs is not known here"),
        ("2.31.7.0", "", "unknown", "which driver SDK of the image needs is not known here"),
        ("2.9.4.0", "2.22", "unknown", "older than"),
    ],
)
def test_what_aws_says_of_a_pair(driver: str, sdk: str, verdict: str, words: str) -> None:
    found, why = judge(driver, sdk, trainium2=False)
    assert found == verdict
    assert words in why


def test_trainium2_needs_a_driver_of_its_own() -> None:
    assert judge("2.20.27.0", "2.22", trainium2=True)[0] == "fails"
    assert judge("2.20.28.0", "2.22", trainium2=True)[0] == "works"
    assert judge("2.20.27.0", "2.22", trainium2=False)[0] == "works"
