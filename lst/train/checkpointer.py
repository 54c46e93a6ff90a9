"""When checkpoints are written: in the background, one at a time, again where one failed.

::

    training    step 100 ▸ copy ▸ 101 ▸ 102 ▸ 103 ▸ …           poll: saved, or tell and try again
    a thread                    ▸ write, hash, rename ▸ remove old ▸

Training waits for the copy to the host's memory alone. Checkpoints that cannot be written (a full
disk) do not stop a run: it tells of each and tries again after a few steps, then more. One that
does not get on (a disk that hangs) is told of too, while training goes on. The last one of a run
is waited for, and where it cannot be written that is an error.
"""

from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lst.errors import UserError
from lst.model import LanguageModel
from lst.train.checkpoint import State, remove_left_overs, remove_old, save_checkpoint
from lst.train.config import TrainConfig
from lst.train.distributed import SharedError, World
from lst.train.metrics import MetricsLog
from lst.train.optimizer import optimizer_tensors
from lst.train.watchdog import WRITER
from lst.vocabulary import Tokenizer

RETRY_STEPS = 10  # before the first new try; twice as many before the second, and so on


@dataclass(kw_only=True)
class Save:
    """A checkpoint under way, and how it ended."""

    step: int
    stalled: bool = False  # at some time
    folder: Path | None = None
    error: BaseException | None = None
    notes: list[str] = field(default_factory=list)


class Checkpointer:
    """Saves the checkpoints of a run. Every rank calls every method, in the same order.

    Args:
        resumed: the checkpoint that the run goes on from, and its step (0: from the start).
        log: hears of what could not be saved, and events.jsonl keeps it.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer,
        world: World,
        log: MetricsLog,
        *,
        resumed: tuple[Path | None, int],
    ) -> None:
        self.saved, self._step = resumed  # _step: of the last save that was begun
        self._config, self._tokenizer, self._log = config, tokenizer, log
        self._world, self._aside = world, world.aside()
        self._save: Save | None = None
        self._thread: Thread | None = None
        self._failures = 0  # in a row
        self._retry: int | None = None  # the step to try again at
        if world.is_main:
            try:
                remove_left_overs(config.out)
            except UserError as error:
                log.say(str(error))

    def due(self, step: int, *, last: bool) -> bool:
        """Whether to save after ``step``: every so often, after a failure, and the last."""
        if step == self._step:
            return False
        retry = self._retry is not None and step >= self._retry
        return last or retry or step % self._config.checkpoint_every == 0

    def save(self, state: State, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        """Copy all that a checkpoint holds and begin to write it; wait for one still under way."""
        self._settle(state.step, retry=state.step)
        self._step, self._retry = state.step, None
        weights = host_copy(model.weights())
        moments = host_copy(optimizer_tensors(model, optimizer))
        self._save = Save(step=state.step)
        # A daemon: Ctrl-C, pressed again, does not wait for a disk that hangs.
        self._thread = Thread(
            target=self._write,
            args=(self._save, state, weights, moments),
            name=WRITER,
            daemon=True,
        )
        self._thread.start()

    def poll(self, step: int, stalled: tuple[Thread, str] | None = None) -> None:
        """After ``step``, take note of a save that has ended on every rank, or does not get on.

        Args:
            stalled: a thread that does not, and where (lst.train.watchdog).
        """
        if self._thread is None:
            return
        if stalled is not None and stalled[0] is self._thread:
            self._tell_stalled(step, stalled[1])
        if not self._world.sum(torch.tensor(int(self._thread.is_alive()))):
            self._settle(step, retry=step + RETRY_STEPS * (self._failures + 1))

    def last(self) -> Path | None:
        """The newest checkpoint that is complete, after one still under way has ended."""
        self._settle(self._step, retry=self._step)
        return self.saved

    def finish(self) -> None:
        """Wait for the save under way. Raises SharedError where it cannot be written."""
        save = self._join()
        if save is not None and isinstance(save.error, UserError):
            raise SharedError(str(save.error))

    def close(self) -> None:
        """Wait for the save under way, whatever has ended the run, and tell where it failed."""
        self._settle(self._step, retry=None)

    def _settle(self, step: int, *, retry: int | None) -> None:
        """Wait for the save under way and, after ``step``, take note of how it ended."""
        save = self._join()
        if save is None or save.error is None:
            return
        self._failures, self._retry = self._failures + 1, retry
        again = "" if retry is None else f"; trying again after step {retry}"
        self._log.say(f"the checkpoint of step {save.step} was not saved: {save.error}{again}")
        event = {"event": "checkpoint", "checkpoint": save.step, "error": str(save.error)}
        self._log.event(step, event)

    def _tell_stalled(self, step: int, where: str) -> None:
        """Once a save."""
        assert self._save is not None
        if self._save.stalled:
            return
        self._save.stalled = True
        self._log.say(f"the checkpoint of step {self._save.step}: {where}; training goes on")
        event = {"event": "checkpoint stalled", "checkpoint": self._save.step, "reason": where}
        self._log.event(step, event)

    def _join(self) -> Save | None:
        if self._thread is None:
            return None
        self._thread.join()
        save, self._save, self._thread = self._save, None, None
        assert save is not None
        for note in save.notes:
            self._log.say(note)
        if save.error is None:
            if self._failures or save.stalled:
                self._log.say(f"the checkpoint of step {save.step} is saved")
            self.saved, self._failures = save.folder, 0
        elif not isinstance(save.error, UserError):
            raise save.error
        return save

    def _write(
        self, save: Save, state: State, weights: dict[str, Tensor], moments: dict[str, Tensor]
    ) -> None:
        """What the thread does."""
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # a thread begins with the first GPU
        try:
            save.folder = save_checkpoint(
                self._config, state, self._tokenizer, weights, moments, self._aside
            )
        except BaseException as error:
            save.error = error
            return
        if self._aside.is_main:
            try:
                remove_old(self._config, save.folder)
            except UserError as error:
                save.notes.append(f"an old checkpoint was not removed: {error}")


def host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, of DTensors the part of this rank, in the host's memory."""
    # Neither pinned nor kept for the next time: PyTorch 2.11 uses a stager once.
    stager = DefaultStager(StagingOptions(False, False, False, False))
    copies: dict[str, Tensor] = stager.stage(tensors)  # type: ignore[assignment]
    stager.close()
    return copies
