"""The sample DAGs."""

from kfp import dsl

from tests.pipelines.sample import component
from tests.pipelines.sample import unimportable as elsewhere


@dsl.pipeline(name="sample")
def sample(write_words: str, count_words: str, announce: str, archive: str) -> None:
    """Write, count, announce."""
    words = component.write_words(section=write_words).outputs["manifest"]
    count = component.count_words(section=count_words, words=words).outputs["manifest"]
    announcement = component.announce(section=announce, count=count).outputs["manifest"]
    component.archive(section=archive, announcement=announcement)


@dsl.pipeline(name="unimportable")
def unimportable(write_words: str, count_words: str, announce: str, archive: str) -> None:
    """The same with a step whose module cannot be imported."""
    words = component.write_words(section=write_words).outputs["manifest"]
    count = elsewhere.count_words(section=count_words, words=words).outputs["manifest"]
    announcement = component.announce(section=announce, count=count).outputs["manifest"]
    component.archive(section=archive, announcement=announcement)
