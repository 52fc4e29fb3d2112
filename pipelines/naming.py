"""One component under several names, for a pipeline that needs its step more than once."""

from __future__ import annotations

import copy
from typing import TypeVar

from kfp.dsl.base_component import BaseComponent

Component = TypeVar("Component", bound=BaseComponent)


def named(component: Component, step: str) -> Component:
    """The same component as the task of another step.

    A task is found by the name of its step, and kfp names a task by its component: two uses of one component would be
    `generate` and `generate-2`, whichever comes first.

    Args:
        component: made by `dsl.component`.
        step: name of the step in the recipe, such as `generate_base`.
    """
    other = copy.copy(component)
    other.component_spec = copy.deepcopy(component.component_spec)
    other.component_spec.name = step.replace("_", "-")
    other.name = step
    return other
