"""Story completion at the end of a run."""

from dataclasses import asdict

import torch

from lst.evaluate import format_table, story_completion
from lst.files import Location, write_atomically, write_json
from lst.model import LanguageModel
from lst.train.config import TrainConfig
from lst.train.corpus import Corpus
from lst.train.distributed import World
from lst.train.interrupt import Interrupt, Stopped
from lst.train.metrics import MetricsLog
from lst.train.run_folder import STORIES


def complete_stories(
    config: TrainConfig,
    corpus: Corpus,
    model: LanguageModel,
    log: MetricsLog,
    interrupt: Interrupt,
    world: World,
) -> None:
    """Score the corpus's stories, print the table, write it to ``story_completion.{json,md}``.

    Raises:
        Stopped: a rank was asked to stop; the stories can be completed when the run is resumed.
    """
    if not corpus.items:
        log.say(f"no story completion: {Location(config.data.corpus) / 'items'} holds no stories")
        return
    done = True
    with world.together():
        if world.is_main:
            done = _complete(config, corpus, model, log, interrupt, world)
    if world.sum(torch.tensor(int(not done))):
        interrupt.stop(config.steps, world)


def _complete(
    config: TrainConfig,
    corpus: Corpus,
    model: LanguageModel,
    log: MetricsLog,
    interrupt: Interrupt,
    world: World,
) -> bool:
    """Whether it was done before a signal came."""

    def check(*_: object) -> None:
        if interrupt:
            raise Stopped

    between_batches = model.register_forward_pre_hook(check)
    try:
        scores = story_completion(
            model.eval(),
            corpus.items,
            corpus.vocabulary,
            corpus.tokenizer,
            config.model.plan(),
            patching=config.data.patching,
            device=world.device,
        )
    except Stopped:
        return False
    finally:
        between_batches.remove()
    table = format_table(scores)
    log.say(table)
    write_json(config.out / f"{STORIES}.json", [asdict(score) for score in scores])
    write_atomically(config.out / f"{STORIES}.md", table + "\n")
    return True
