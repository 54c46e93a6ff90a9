"""The whole of training: what happens, in order, between a configuration and a trained model.

::

    corpus → loader → micro-batches → loss / targets of the global batch → gradients → AdamW
                                            ↓
                             metrics, validation, checkpoints

The loss of a step is the sum of its token losses over the number of targets of the *global* batch,
so neither the number of processes nor that of micro-batches changes what is optimised.

A step whose loss or gradient is not finite leaves weights and moments as they are; it still counts
as a step, for the schedule and the data, which go on.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lst.data.batch import Batch
from lst.data.loader import TrainLoader
from lst.errors import UserError, tell
from lst.model import LanguageModel, build_model, count_parameters
from lst.train.anomalies import find_spike, global_records, is_finite
from lst.train.checkpoint import State, load_tensors, newest_checkpoint, read_state
from lst.train.checkpointer import Checkpointer
from lst.train.config import TrainConfig, check_same_run, read_config
from lst.train.corpus import Corpus, check_same_data, open_corpus
from lst.train.distributed import SharedError, World, start_world
from lst.train.interrupt import Interrupt, Stopped, catch_signals
from lst.train.metrics import Loss, MetricsLog, StepTimes, expect_wandb
from lst.train.mfu import describe, find_peak
from lst.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from lst.train.parallel import clip_gradients, gathered, initialise_weights, parallelise
from lst.train.profile import Profiler
from lst.train.run_folder import CONFIG
from lst.train.status import LOST_WORKER, Status, describe_error
from lst.train.step import backward, global_counts, read_step, rehearse
from lst.train.stories import complete_stories
from lst.train.validation import validate
from lst.train.warm_start import start_from_checkpoint, start_from_llama
from lst.train.watchdog import Watchdog

MAX_RECORDS = 16  # named in a message; events.jsonl names all
StepBatches = tuple[tuple[Batch, ...], dict[int, dict[str, Any]]]  # and the lanes' states after


@dataclass(kw_only=True)
class Run:
    """Everything that a run holds while it is under way."""

    config: TrainConfig
    world: World
    corpus: Corpus
    loader: TrainLoader
    model: LanguageModel
    parallel: nn.Module  # model, as its passes are made
    optimizer: torch.optim.Optimizer
    log: MetricsLog
    status: Status
    watch: Watchdog
    state: State
    checkpoints: Checkpointer
    profiler: Profiler


def train(config: TrainConfig, *, resume: bool = False) -> None:
    """Train from the start, or go on with the run in ``config.out`` from its newest checkpoint.

    Under ``torchrun`` every rank calls this. SIGINT, SIGTERM and SIGUSR1 let the step under way
    finish, write a checkpoint and return; before the first step they end the run at once.

    Raises:
        UserError: whatever the user can mend; every rank raises it.
    """
    with (
        catch_signals() as interrupt,
        Status(config, interrupt, resume=resume) as status,
        Watchdog(config.hang_timeout, status, interrupt) as watch,
        start_world(config.device, watch.meeting) as world,
    ):
        watch.join(world)
        try:
            work(config, world, status, watch, interrupt, resume=resume)
        except Stopped as stopped:
            status.stopped()
            if world.is_main:
                go_on = f"python -m lst.train --resume {config.out}"
                tell(f"{stopped}; resume with: {go_on}")
        except (SharedError, KeyboardInterrupt):
            raise
        except Exception as error:
            reason = describe_error(error)
            watch.failed(reason)
            if reason.startswith(LOST_WORKER):
                raise UserError(reason) from error
            raise


def work(
    config: TrainConfig,
    world: World,
    status: Status,
    watch: Watchdog,
    interrupt: Interrupt,
    *,
    resume: bool,
) -> None:
    """What one rank does. Raises Stopped on every rank where one was asked to stop."""
    with ExitStack() as stack:
        run = prepare(config, world, status, watch, interrupt, resume=resume)
        stack.callback(run.log.close)
        stack.callback(run.checkpoints.close)
        stack.callback(end_profile, run)
        stack.callback(watch.now, "the last checkpoint and log", slow=True)
        take_steps(run, interrupt)
        if config.evaluate:
            watch.now("completing stories")
            with gathered(run.model):
                complete_stories(config, run.corpus, run.model, run.log, interrupt, world)


def prepare(
    config: TrainConfig,
    world: World,
    status: Status,
    watch: Watchdog,
    interrupt: Interrupt,
    *,
    resume: bool,
) -> Run:
    """Open the data, build the model, and fill it from the newest checkpoint when resuming."""
    watch.now("opening the run and its data", slow=True)
    with world.together():
        if resume:
            status.begin()
        expect_wandb(config)
    checkpoint = find_resumed(config, world) if resume else None
    with world.together():
        corpus, state, loader = open_data(config, world, checkpoint, resume=resume)
    status.running(state.step, checkpoint)
    interrupt.poll(state.step, world)
    watch.now("building the model", slow=True)
    with torch.device("meta"):  # no rank need ever hold all of a large model
        model = build_model(config.model, corpus.vocabulary)
    parallel = parallelise(model, config, world)
    optimizer = build_optimizer(model, config.optimizer)
    watch.now("loading the weights" if checkpoint else "drawing the weights", slow=True)
    with world.together():
        if checkpoint is not None:
            load_tensors(checkpoint, model, optimizer)
        else:
            initialise_weights(model, config.seed)
            if config.warm_start is not None:
                start_from_llama(model, config, corpus)
            if config.init_from is not None:
                start_from_checkpoint(model, config, corpus)
        status.begin()  # nothing before it leaves anything of a new run
        peak = find_peak(world.device, config.peak_tflops)
        log = MetricsLog(
            config,
            step=state.step,
            seconds=state.seconds,
            seen=state.seen,
            peak=peak,
            num_devices=world.size,
            active=world.is_main,
        )
    parts = ", ".join(f"{name} {number:,}" for name, number in count_parameters(model).items())
    log.say(f"{config.name}: {world.size} × {world.device.type}, {config.out}; parameters: {parts}")
    log.say(describe(peak, world.device, world.size))
    return Run(
        config=config,
        world=world,
        corpus=corpus,
        loader=loader,
        model=model,
        parallel=parallel,
        optimizer=optimizer,
        log=log,
        status=status,
        watch=watch,
        state=state,
        checkpoints=Checkpointer(
            config, corpus.tokenizer, world, log, resumed=(checkpoint, state.step)
        ),
        profiler=Profiler(config.out, world.device, active=config.profile and world.is_main),
    )


def open_data(
    config: TrainConfig, world: World, checkpoint: Path | None, *, resume: bool
) -> tuple[Corpus, State, TrainLoader]:
    """The corpus, the state to go on from, and a loader whose next batch is that of its next step.

    Raises:
        UserError: data that cannot be read; a run resumed as another, or on other data.
    """
    corpus = open_corpus(config.data)
    state = State(
        vocabulary=corpus.vocabulary, datasets=corpus.fingerprints, codebook=corpus.codebook
    )
    if resume:
        started = checkpoint or config.out
        check_same_run(read_config(started / CONFIG), config, str(started))
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_same_data(corpus, state, str(checkpoint))
        state = replace(state, codebook=corpus.codebook)  # an older one does not say
    loader = TrainLoader(
        config.data,
        corpus.vocabulary,
        corpus.tokenizer,
        config.model.plan(),
        seed=config.seed,
        total_steps=config.steps,
        rank=world.rank,
        world_size=world.size,
        accumulation=config.accumulation,
        pin=world.device.type == "cuda",
        states=state.lanes or None,
    )
    return corpus, state, loader


def find_resumed(config: TrainConfig, world: World) -> Path | None:
    """The checkpoint to go on from; None where the run was stopped before it had one."""

    def say(message: str) -> None:
        if world.is_main:
            tell(message)

    checkpoint = newest_checkpoint(config.out, world, say)
    say(f"{config.out}: resuming from {checkpoint or 'the start, as it has no checkpoint yet'}")
    return checkpoint


def take_steps(run: Run, interrupt: Interrupt) -> None:
    """Take optimizer steps, up to ``config.steps`` or until a rank is asked to stop."""
    batches = iter(run.loader)
    is_first, stop = True, False
    while True:
        stop = stop or not validate_if_due(run, interrupt)
        last = stop or run.state.step == run.config.steps
        save_if_due(run, last=last)
        if last:
            break
        stop = take_step(run, batches, interrupt, is_first=is_first)
        is_first = False
    if stop:
        run.log.plot()  # a run that ends has drawn them with its last validation
        interrupt.stop(run.state.step, run.world)


def validate_if_due(run: Run, interrupt: Interrupt) -> bool:
    """False where the validation was broken off, as a rank is asked to stop."""
    step = run.state.step
    if not validation_is_due(run.config, run.state):
        return True
    run.watch.now("validation")
    with gathered(run.model):
        losses = validate(run.config, run.corpus, run.model, interrupt, run.world)
    if losses is None:
        return False
    run.log.validation(step, losses, run.state.seen)
    tell_left_out(run)
    run.state = replace(run.state, validated=step)
    return True


def save_if_due(run: Run, *, last: bool) -> None:
    """Begin to write a checkpoint, if it is time for one; the last is waited for."""
    step = run.state.step
    run.watch.now("a checkpoint", slow=True)
    run.checkpoints.poll(step, run.watch.stalled)
    if run.checkpoints.due(step, last=last):
        run.log.sync()
        run.state = replace(run.state, seconds=run.log.seconds)
        run.watch.now("a checkpoint", slow=True, saves=True)
        run.checkpoints.save(run.state, run.model, run.optimizer)
    run.watch.now("a checkpoint", slow=True, saves=last)
    run.status.running(step, run.checkpoints.saved)
    if last:
        run.checkpoints.finish()
        run.status.running(step, run.checkpoints.saved)


def take_step(
    run: Run, batches: Iterator[StepBatches], interrupt: Interrupt, *, is_first: bool
) -> bool:
    """Take one step, log it, and name the records behind what is odd about it.

    Args:
        is_first: of this process: it is rehearsed, and a stop before it ends the run at once.

    Returns:
        Whether a rank is asked to stop.
    """
    config, world, model, log = run.config, run.world, run.model, run.log
    step = run.state.step + 1
    run.watch.now("waiting for data", awaited=lambda: run.loader.awaited)
    run.profiler.before()
    started = time.perf_counter()
    with world.together():
        micro_batches, lanes = next(batches)
    waited = time.perf_counter() - started
    run.watch.now(f"step {step}")
    if is_first:
        interrupt.poll(run.state.step, world)
        rehearse(run.parallel, micro_batches, precision=config.precision, world=world)
        interrupt.poll(run.state.step, world)
    counts = global_counts(micro_batches, world)
    lr = learning_rate(step, config.optimizer, config.steps)
    set_learning_rate(run.optimizer, lr)
    sums = backward(
        run.parallel,
        micro_batches,
        targets=counts.targets,
        precision=config.precision,
        world=world,
    )
    norm = clip_gradients(model, config.optimizer.clip)
    loss, grad_norm, stop = read_step(sums, norm, bool(interrupt), counts, world)
    updated = is_finite(loss, grad_norm)
    if updated:
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.state = replace(
        run.state,
        step=step,
        lanes=lanes,
        seen=run.state.seen.after(counts, config.model, run.corpus.vocabulary),
        skipped=run.state.skipped + (not updated),
        skipped_in_a_row=0 if updated else run.state.skipped_in_a_row + 1,
    )
    log.training_step(
        step,
        loss,
        run.state.seen,
        StepTimes(seconds=time.perf_counter() - started, data=waited),
        lr=lr,
        grad_norm=grad_norm,
        skipped=run.state.skipped,
    )
    profile_step(run)
    run.watch.stepped()
    tell_anomalies(run, loss, grad_norm, partial(global_records, micro_batches, sums))
    return stop


def profile_step(run: Run) -> None:
    if run.profiler.writes:
        run.watch.now("the profile", slow=True)
    told = run.profiler.after()
    if told is not None:
        run.log.say(told)


def end_profile(run: Run) -> None:
    told = run.profiler.close()
    if told is not None:
        run.log.say(told)


def tell_anomalies(
    run: Run,
    loss: Loss,
    grad_norm: float,
    records: Callable[[Loss, World], list[str]],
) -> None:
    """Name the records behind a step that was skipped or whose loss jumped.

    Raises:
        SharedError: too many steps in a row were skipped.
    """
    state = run.state
    event: dict[str, Any]
    if state.skipped_in_a_row:
        mean = loss.per_token()["loss"]
        event = {
            "event": "skipped",
            "loss": mean,
            "grad_norm": grad_norm,
            "in_a_row": state.skipped_in_a_row,
        }
        what = f"expected a finite loss and gradient, got loss {mean} and gradient norm {grad_norm}"
    else:
        spike, recent = find_spike(state.recent, loss)
        run.state = replace(state, recent=recent)
        if spike is None:
            return
        event = {"event": "spike", "grad_norm": grad_norm, **vars(spike)}
        what = str(spike)
    ids = records(loss, run.world)
    run.log.event(state.step, event | {"records": ids})
    more = f" and {len(ids) - MAX_RECORDS} more" if len(ids) > MAX_RECORDS else ""
    message = f"step {state.step}: {what}; records {', '.join(ids[:MAX_RECORDS])}{more}"
    if state.skipped_in_a_row >= run.config.max_skipped:
        raise SharedError(
            f"{message}; {state.skipped_in_a_row} updates in a row were skipped; "
            f"last checkpoint: {run.checkpoints.last() or 'none'}"
        )
    run.log.say(message + ("; the update is skipped" if state.skipped_in_a_row else ""))


def tell_left_out(run: Run) -> None:
    """Say how many documents so far no row could hold (lst.data.lanes); every rank calls it."""
    sources = (source for lane in run.state.lanes.values() for source in lane["sources"].values())
    number = int(run.world.sum(torch.tensor(sum(source.get("left_out", 0) for source in sources))))
    if number:
        step, units = run.state.step, run.config.data.units_per_sequence - 1
        run.log.event(step, {"event": "left out", "documents": number})
        run.log.say(
            f"step {step}: {number} documents so far were left out, being longer than a row of "
            f"{units} units (--data.units-per-sequence)"
        )


def validation_is_due(config: TrainConfig, state: State) -> bool:
    """Every so many steps and at the last, unless a run before this one has done it."""
    return state.step > state.validated and (
        state.step % config.validate_every == 0 or state.step == config.steps
    )
