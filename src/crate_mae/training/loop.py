"""The training loop, to be read from top to bottom: build, resume, step, log, save.

It serves every task. What pretraining and fine-tuning do differently is in `pretraining` and `finetuning`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from accelerate import Accelerator
from accelerate.utils import gather_object

from crate_mae.data import BadImage, Batch
from crate_mae.errors import DivergedError, RunStopped, UserError
from crate_mae.training import checkpoint
from crate_mae.training.bad_images import BadImages
from crate_mae.training.checkpoint import TrainState
from crate_mae.training.files import is_disk_full
from crate_mae.training.images import training_batches
from crate_mae.training.logbook import Logbook
from crate_mae.training.memory import first_step
from crate_mae.training.processes import first_decides, lost_processes_explained, stop_requests
from crate_mae.training.progress import Display
from crate_mae.training.report import RunReport
from crate_mae.training.run_directory import RunDirectory
from crate_mae.training.saver import Saver
from crate_mae.training.step import training_step
from crate_mae.training.task import Task
from crate_mae.training.trackers import close_trackers, start_trackers
from crate_mae.training.trainee import Trainee, build_trainee

logger = logging.getLogger(__name__)

MOST_SKIPPED_IN_A_ROW = 5


def train(
    task: Task, accelerator: Accelerator, *, directory: RunDirectory, display: Display, plan: Sequence[str] = ()
) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end of the run.

    Args:
        task: what to learn from what, checked.
        accelerator: brings devices and processes together.
        directory: where everything is kept.
        display: shows the plan and the progress.
        plan: lines to show before the first step, and to keep in the log.

    Raises:
        UserError: for a reason to stop that the user can mend. What was saved stays whole.
        RunStopped: after SIGINT or SIGTERM, when everything has been saved.
    """
    try:
        with ExitStack() as stack:
            first_decides(accelerator, lambda: stack.enter_context(directory.opened(task.config)))
            stack.enter_context(_full_disk_explained(directory))
            stack.enter_context(lost_processes_explained(accelerator, directory.resume_command))
            display.lines(plan)

            # Build.
            trainee = build_trainee(task, accelerator)

            # Resume.
            state = _resume(task, accelerator, directory, trainee)
            start_trackers(accelerator, task.config, directory.path, state.step)
            stack.callback(close_trackers, accelerator)

            # Closed with the run, so that no loader process outlives it, whatever ends it.
            batches = stack.enter_context(closing(_batches(task, accelerator, state.step)))
            report = RunReport(directory, task, plan, writes=accelerator.is_main_process)
            stack.enter_context(closing(report))
            _learn(task, accelerator, trainee, state, batches, directory=directory, display=display, report=report)
    except RunStopped:
        accelerator.wait_for_everyone()  # a launcher ends all processes, at once, when the first has ended
        raise


def _learn(
    task: Task,
    accelerator: Accelerator,
    trainee: Trainee,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    directory: RunDirectory,
    display: Display,
    report: RunReport,
) -> None:
    """From the state's step to the end of the run: step, log, save."""
    config = task.config
    bad_images = BadImages(directory.bad_files, config.max_bad, writes=accelerator.is_main_process)
    bad_images.add(0, task.bad_held_out)
    log = Logbook(directory, task, accelerator, report)
    saver = Saver(directory, task, trainee=trainee, accelerator=accelerator)

    with stop_requests() as request, display.training(state.step, config.steps):
        if state.step == 0:
            log.begin(trainee)
        begun_at = state.step
        while state.step < config.steps:
            # Step.
            due = saver.is_due_by_clock()
            with first_step(is_first=state.step == begun_at):
                step = training_step(task, accelerator, trainee, batches, state.step, stop=request.signal, save=due)
            state.count(step.loss, step.is_finite)
            if step.is_finite:
                trainee.move_average(state.step)

            # Log.
            too_many_bad = step.agreed.bad_images and _note_bad_images(task, bad_images, state.step, step.bad_images)
            is_best = log.record(trainee, state, step.log, bad_images=len(bad_images))
            display.step(state.step, step.loss, log.images_per_second, log.data_wait)

            # Save.
            if step.agreed.save or step.agreed.stop or too_many_bad or is_best or saver.is_due_by_epoch(state):
                saver.save(state)
            if too_many_bad:
                raise bad_images.error(task.images_seen(state.step))
            if state.skipped_in_a_row >= min(MOST_SKIPPED_IN_A_ROW, config.steps):
                raise _diverged(directory, state)
            if step.agreed.stop and state.step < config.steps:
                display.lines([f"Stopped and saved at step {state.step}. To go on: {directory.resume_command}"])
                raise RunStopped(step.agreed.stop)
        saver.save_model(state)


def _resume(task: Task, accelerator: Accelerator, directory: RunDirectory, trainee: Trainee) -> TrainState:
    """The state to go on from; logs are cut back to it."""
    images = len(task.images.train)
    folder = checkpoint.newest_checkpoint(directory.path)
    if folder is None:
        state = TrainState(images=images)
    else:
        state = checkpoint.read(folder, trainee)
        if state.images != images:
            raise UserError(
                f"This run trains on {state.images} images, but its data now has {images}.\n"
                "Put the data back as it was, or start a new run with another --out."
            )
        logger.info("Resuming from %s, which %d process(es) wrote.", folder, state.world_size)
    state.world_size = accelerator.num_processes
    if accelerator.is_main_process:
        directory.cut_back(None if folder is None else state.step)
    accelerator.wait_for_everyone()
    return state


def _batches(task: Task, accelerator: Accelerator, start_step: int) -> Generator[Batch]:
    return training_batches(
        task.images.train,
        task.transform(),
        task.config,
        start_step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pin_memory=accelerator.device.type == "cuda",
    )


def _note_bad_images(task: Task, bad_images: BadImages, step: int, found: list[BadImage]) -> bool:
    """Write down what all processes found; whether new ones make too many."""
    return bad_images.add(step, gather_object(found)) and bad_images.too_many(task.images_seen(step))


def _diverged(directory: RunDirectory, state: TrainState) -> DivergedError:
    last = checkpoint.newest_checkpoint(directory.path)
    return DivergedError(
        f"Loss or gradients were not finite {state.skipped_in_a_row} steps in a row, up to step {state.step}.\n"
        f"The last good checkpoint is {last or 'none: the run had only begun'}.\n"
        "Start a new run with a lower --lr, a longer --warmup-epochs, or --precision float32."
    )


@contextmanager
def _full_disk_explained(directory: RunDirectory) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        last = checkpoint.newest_checkpoint(directory.path)
        raise UserError(
            f"The disk of {directory.path} is full, so the run has stopped. "
            + (f"Its last checkpoint, {last.name}, is whole." if last else "It had no checkpoint yet.")
            + f"\nFree some space, then: {directory.resume_command}"
        ) from error
