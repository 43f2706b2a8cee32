"""What a person sees while a training runs: lines, a progress bar, TensorBoard."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from clu.asynclib import AsyncError
from tqdm import tqdm

from performer_vit import cluster, events
from performer_vit import workdir as run_directory


def say(dataset_name: str, text: str) -> None:
    """Prints lines, each under the name of the data set that was really read; process 0 alone."""
    if not cluster.is_main():
        return
    for line in text.splitlines():
        tqdm.write(f'[{dataset_name}] {line}', file=sys.stdout)
    sys.stdout.flush()


def remaining(started: float, done: int, total: int) -> str:
    """', about 12 min left' of a series of runs that began at a `time.perf_counter()`.

    Nothing before the first run is done.

    Args:
      started: when the series began, or went on.
      done, total: how many runs have been done since then, and how many were to be done. Those that
        had been finished earlier count in neither: they take no time.
    """
    if not done:
        return ''
    minutes = (time.perf_counter() - started) / done * (total - done) / 60
    return f', about {minutes:.0f} min left'


class Progress:
    """The bar with ETA and images/s, and TensorBoard's scalars, images and hyperparameters.

    What an earlier process of the run showed of the steps after the first is forgotten, and what is
    missing of the steps before is shown again. Of several processes, process 0 alone shows
    anything.

    Args:
      workdir: where TensorBoard's event files go.
      dataset_name: what was really read; it leads every line and is a hyperparameter.
      title: of the bar, the name of the model.
      config: of the run: its hyperparameters, and whether to trace steps with the profiler.
      first_step, last_step: of this process, and of the training.
      scalars: [step, {tag: value}] of what earlier processes had shown by the first step.

    Attributes:
      scalars: all that TensorBoard has of the training, as the checkpoints keep it: the argument,
        and what this process has shown since.
      failure: why TensorBoard's files could not be written, or None. `flush` raises it, since of
        several processes one alone must not end in the middle of an epoch.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        dataset_name: str,
        title: str,
        config,
        first_step: int,
        last_step: int,
        scalars: Sequence[list] = (),
    ):
        # Imports TensorFlow, which takes seconds: only a run needs it.
        from clu import metric_writers, periodic_actions

        self._dataset_name = dataset_name
        self._batch_size = config.batch_size
        self._num_epochs = config.num_epochs
        self.scalars = list(scalars)
        self.failure = None
        self._writer = metric_writers.MultiWriter([])
        cluster.from_main(lambda: self._open(workdir, config, first_step))
        self._hooks = []
        if config.profile and cluster.is_main():
            # Hooks hear of every `log_every_steps`-th step alone, so the trace goes from the first
            # report to one that is five steps or more later.
            first_report = (first_step // config.log_every_steps + 1) * config.log_every_steps
            if first_report >= last_step:
                say(
                    dataset_name,
                    f'profile: nothing is traced, since the run ends at step {last_step:,} and its '
                    f'first report is at step {first_report:,}; set log_every_steps lower.',
                )
            profile = periodic_actions.Profile(
                logdir=str(workdir),
                num_profile_steps=5,
                profile_duration_ms=None,
                first_profile=first_report,
                every_secs=None,
            )
            self._hooks.append(profile)
        self._bar = tqdm(
            total=last_step * self._batch_size,
            initial=first_step * self._batch_size,
            desc=f'[{dataset_name}] {title}',
            unit='img',
            unit_scale=True,
            mininterval=1.0,
            dynamic_ncols=True,
            disable=not cluster.is_main(),
        )
        self.resume(first_step)

    def _open(self, workdir: str | os.PathLike, config, first_step: int) -> None:
        """Begins to write TensorBoard's files."""
        from clu import metric_writers

        lost = events.missing(workdir, self.scalars)
        # What was lost is shown in its order, so all of it anew.
        again = {(tag, step) for step, values in self.scalars for tag in values} if lost else ()
        events.forget_after(workdir, first_step, again)
        self._writer = metric_writers.create_default_writer(str(workdir), asynchronous=True)
        if lost:
            say(
                self._dataset_name,
                f"TensorBoard's files lack {lost:,} of the values up to step {first_step:,}: all "
                'of them are written again, from the checkpoint.',
            )
            for step, values in self.scalars:
                self._writer.write_scalars(step, values)
        fields = run_directory.flatten(config.to_dict())
        hparams = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in fields.items()
        }
        self._writer.write_hparams({**hparams, 'dataset_read': self._dataset_name})

    def resume(self, step: int) -> None:
        """Starts the clock of images/s anew: what came before `step` was not training."""
        self._step, self._time = step, time.perf_counter()

    def steps_done(self, step: int, metrics: dict[str, float]) -> None:
        """Shows that training has come to `step`, with the metrics of its last step."""
        now = time.perf_counter()
        images = (step - self._step) * self._batch_size
        scalars = {f'train/{name}': value for name, value in metrics.items()}
        scalars['train/images_per_second'] = images / (now - self._time)
        self._step, self._time = step, now
        self._show(step, scalars)
        self._bar.update(images)
        self._bar.set_postfix(loss=f'{metrics["loss"]:.3f}', refresh=False)
        for hook in self._hooks:
            hook(step)

    def _show(self, step: int, scalars: dict[str, float]) -> None:
        try:
            with _errors_of_the_thread():
                self._writer.write_scalars(step, scalars)
        except Exception as error:  # Of any kind, and of what was written before.
            self.failure = self.failure or error
        self.scalars.append([step, scalars])

    def epoch_done(self, row: dict) -> None:
        """Shows a row of the history."""
        scalars = {
            f'epoch/{name}': row[name]
            for name in run_directory.HISTORY_COLUMNS[3:]
            if row[name] is not None
        }
        self._show(row['step'], scalars)
        line = (
            f'Epoch {row["epoch"]}/{self._num_epochs}: loss {row["train_loss"]:.4f}, '
            f'accuracy {row["train_accuracy"]:.2%}'
        )
        if row['validation_loss'] is not None:
            line += (
                f'; validation loss {row["validation_loss"]:.4f}, '
                f'accuracy {row["validation_accuracy"]:.2%}'
            )
        say(self._dataset_name, f'{line}; {row["seconds"]:.1f} s')
        self._bar.update(row['step'] * self._batch_size - self._bar.n)

    def tested(self, step: int, loss: float, accuracy: float, images: dict[str, np.ndarray]):
        """Shows the final test of the state of `step`; `images` are (h, w, 3) uint8 by name."""
        with _errors_of_the_thread():
            self._writer.write_scalars(step, {'test/loss': loss, 'test/accuracy': accuracy})
            self._writer.write_images(step, {name: image[None] for name, image in images.items()})
        self.flush()

    def flush(self) -> None:
        """Waits until all that was shown is in TensorBoard's files.

        To be called before the checkpoint of a step is written: a run that goes on from there
        shows nothing of the steps before. Raises what it could not be written for.
        """
        if self.failure:
            raise self.failure
        with _errors_of_the_thread():
            self._writer.flush()

    def close(self) -> None:
        """Ends the bar and writes out what TensorBoard's files still lack."""
        self._bar.close()
        if self._hooks:
            # A run may end while steps are traced; where none are, there is nothing to stop.
            with contextlib.suppress(RuntimeError):
                jax.profiler.stop_trace()
        with _errors_of_the_thread():
            self._writer.close()


@contextlib.contextmanager
def _errors_of_the_thread() -> Iterator[None]:
    """Raises the errors of the thread that writes TensorBoard's files as they were there.

    clu wraps them in advice to whoever programs with it.
    """
    try:
        yield
    except AsyncError as error:
        while isinstance(error, AsyncError):
            error = error.__cause__
        raise error from (error.__cause__ or error.__context__)
