"""From a model to a score."""

from lst.evaluate.choice import Score, format_table
from lst.evaluate.story_completion import story_completion

__all__ = ["Score", "format_table", "story_completion"]
