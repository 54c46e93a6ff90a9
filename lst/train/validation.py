"""Loss on the validation sets: every document once, speech in patches of the final strategy."""

import torch

from lst.data.loader import validation_batches
from lst.model import LanguageModel
from lst.train.config import TrainConfig
from lst.train.corpus import Corpus
from lst.train.distributed import World
from lst.train.interrupt import Interrupt
from lst.train.metrics import Loss
from lst.train.parallel import autocast
from lst.train.step import loss_sums


@torch.no_grad()
def validate(
    config: TrainConfig, corpus: Corpus, model: LanguageModel, interrupt: Interrupt, world: World
) -> dict[str, Loss] | None:
    """Loss by validation set (``valid/NAME``), each rank taking its share of the documents.

    Ranks may make different numbers of forward passes, so a sharded model must be ``gathered``.

    Returns:
        None where a rank was asked to stop: a validation can be long, and can be done later.
    """
    losses = {}
    for name, dataset in corpus.valid.items():
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        targets = speech_targets = units_to_predict = 0
        with world.together():
            batches = validation_batches(
                dataset,
                corpus.vocabulary,
                corpus.tokenizer,
                config.model.plan(),
                config.data.patching,
                units_per_batch=config.data.units_per_sequence,
                seed=config.seed,
                rank=world.rank,
                world_size=world.size,
                task=config.data.task,
            )
            for batch in batches:
                if interrupt:
                    break
                batch = batch.to(world.device, non_blocking=True)
                with autocast(model, config.precision, world.device):
                    sums += loss_sums(model(batch), batch)
                targets += batch.num_targets
                speech_targets += batch.num_speech_targets
                units_to_predict += batch.num_units_to_predict
        numbers = torch.tensor([targets, speech_targets, units_to_predict, int(bool(interrupt))])
        targets, speech_targets, units_to_predict, stops = world.sum(numbers).tolist()
        if stops:
            return None
        text, speech = world.sum(sums).tolist()
        if not targets:  # no record is of the task that is learnt
            continue
        losses[f"valid/{name}"] = Loss(
            text=text,
            speech=speech,
            text_targets=targets - speech_targets,
            speech_targets=speech_targets,
            units_to_predict=units_to_predict,
        )
    return losses
