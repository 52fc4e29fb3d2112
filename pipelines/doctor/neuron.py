"""Which driver of a node goes with the Neuron SDK of an image, as far as AWS says.

The driver (`aws-neuronx-dkms`) comes with the AMI, the runtime library (`aws-neuronx-runtime-lib`) with the image. AWS
publishes no table of the two. What it does say, read on 2026-11-21:

- which versions each SDK was released with: `n2-manifest.json` of github.com/aws-neuron/aws-neuron-sdk for 2.22 to
  2.32, "Neuron Component Release Notes" of https://awsdocs-neuron.readthedocs-hosted.com/en/v2.33.0 for 2.33;
- a driver works with older runtimes, but a runtime may need a newer driver than it has ("Neuron Runtime
  troubleshooting", compatibility id);
- Runtime 2.32 does not work with driver 2.26 or earlier (known issues of "Neuron Runtime (Neuron 2.30.0 Release)" and
  of the containers of that release, which also ask for the SDK's own driver: "Update Neuron containers");
- driver 2.29 needs runtime 2.33 or later, `nrt_init()` fails otherwise (known issues of "Neuron 2.31.0 Release"): an
  exception to the second rule, of which no later note says whether it also holds for the drivers after it;
- on Trainium2, runtime 2.24 or later needs driver 2.20.28 (notes of driver 2.20.28).

What none of these covers is unknown, and said to be.
"""

from __future__ import annotations

import re
from typing import Literal

# SDK -> runtime library, driver.
_RELEASED = {
    "2.22": ("2.24", "2.20"),
    "2.23": ("2.25", "2.21"),
    "2.24": ("2.26", "2.22"),
    "2.25": ("2.27", "2.23"),
    "2.26": ("2.28", "2.24"),
    "2.27": ("2.29", "2.25"),
    "2.28": ("2.30", "2.26"),
    "2.29": ("2.31", "2.27"),
    "2.30": ("2.32", "2.28"),
    "2.31": ("2.33", "2.29"),
    "2.32": ("2.34", "2.30"),
    "2.33": ("2.35", "2.31"),
}
_NEWEST = (2, 31)  # driver that is known here
_TRAINIUM2_DRIVER = (2, 20, 28)
_BREAKING_DRIVER, _FIRST_RUNTIME = (2, 29), (2, 33)  # this driver refuses runtimes before that
_BREAKING_RUNTIME, _LAST_DRIVER = (2, 32), (2, 26)  # this runtime refuses drivers up to that

Verdict = Literal["works", "fails", "unknown"]


def judge(driver: str, sdk: str, *, trainium2: bool) -> tuple[Verdict, str]:
    """Whether a container of an SDK works on a node, and what that follows from.

    Args:
        driver: version on the node, such as `2.27.4.0`.
        sdk: `2.30`; empty where the image does not say.
        trainium2: whether the node has devices of that generation.
    """
    if sdk not in _RELEASED:
        return "unknown", f"which driver SDK {sdk or 'of the image'} needs is not known here"
    runtime, own = (_numbers(version) for version in _RELEASED[sdk])
    has = _numbers(driver)
    if trainium2 and has < _TRAINIUM2_DRIVER[: len(has)]:
        return "fails", f"on Trainium2 the image's SDK {sdk} needs driver 2.20.28 or newer"
    has = has[:2]
    if has == own:
        return "works", f"that of SDK {sdk}"
    if runtime == _BREAKING_RUNTIME:
        if has <= _LAST_DRIVER:
            return "fails", f"the image's SDK {sdk} needs one newer than 2.26"
        if has < own:
            return "works", f"enough for SDK {sdk}"
    if has >= _BREAKING_DRIVER and runtime < _FIRST_RUNTIME:
        if has == _BREAKING_DRIVER:
            return "fails", f"driver 2.29 needs an image of SDK 2.31 or newer, and this one has {sdk}"
        return "unknown", f"driver 2.29 refuses SDK {sdk}, and AWS does not say whether later ones take it again"
    if has > _NEWEST:
        return "unknown", "a driver that new is not known here"
    if has > own:
        return "works", f"newer than that of SDK {sdk}, {'.'.join(map(str, own))}"
    return (
        "unknown",
        f"older than that of SDK {sdk}, {'.'.join(map(str, own))}, and AWS does not say that it is enough",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
