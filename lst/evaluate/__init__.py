"""From a model to a score."""

from lst.evaluate.story_completion import Score, format_table, story_completion

__all__ = ["Score", "format_table", "story_completion"]
