"""Story completion at the end of a run."""

from dataclasses import asdict

from lst.evaluate import format_table, story_completion
from lst.files import Location
from lst.model import LanguageModel
from lst.train.config import TrainConfig
from lst.train.corpus import Corpus
from lst.train.distributed import World
from lst.train.metrics import MetricsLog
from lst.train.run_folder import STORIES, write_atomically, write_json


def complete_stories(
    config: TrainConfig, corpus: Corpus, model: LanguageModel, log: MetricsLog, world: World
) -> None:
    """Score the corpus's stories, print the table, write it to ``story_completion.{json,md}``."""
    if not corpus.items:
        log.say(f"no story completion: {Location(config.data.corpus) / 'items'} holds no stories")
        return
    with world.together():
        if not world.is_main:
            return
        scores = story_completion(
            model.eval(),
            corpus.items,
            corpus.vocabulary,
            corpus.tokenizer,
            config.model.plan(),
            patching=config.data.patching,
            device=world.device,
        )
        table = format_table(scores)
        log.say(table)
        write_json(config.out / f"{STORIES}.json", [asdict(score) for score in scores])
        write_atomically(config.out / f"{STORIES}.md", table + "\n")
