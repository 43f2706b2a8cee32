"""TensorBoard's event files of a run that goes on from a checkpoint."""

import os
import pathlib
from collections.abc import Collection, Iterator, Sequence

from performer_vit import files

# Tags of what a run writes at its steps, and of what each of its processes writes anew.
_AT_STEPS = ('train/', 'epoch/')
_ANEW = ('test/', '_hparams_/')


def forget_after(
    workdir: str | os.PathLike, step: int, again: Collection[tuple[str, int]] = ()
) -> None:
    """Takes out of the event files what the run is going to write again.

    That is what it had written of the steps after `step`, of its test and of its hyperparameters,
    and the half of a record with which a killed process may have ended a file. Everything else in
    the files stays, also what others wrote. A file is rewritten in one step, and one that would be
    empty is deleted.

    Args:
      workdir: the directory that they are in, not those below it.
      step: of the checkpoint, 0 for none.
      again: tag and step of what else it is going to write again.
    """
    import tensorflow as tf  # Takes seconds: only a run needs it.

    for path in sorted(pathlib.Path(workdir).glob('*tfevents*')):
        records = list(_records(path))
        events = [tf.compat.v1.Event.FromString(record) for record in records]
        kept = [r for r, e in zip(records, events, strict=True) if _stays(e, step, again)]
        if len(kept) == len(records) and _is_whole(path, records):
            continue
        if all(tf.compat.v1.Event.FromString(record).file_version for record in kept):
            path.unlink()
            continue
        with files.replacing(path) as temporary:
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for record in kept:
                    writer.write(record)


def missing(workdir: str | os.PathLike, expected: Sequence[list]) -> int:
    """How many of the expected scalars, [step, {tag: value}] each, are not in the event files."""
    found = {(tag, step) for tag, step, _ in scalars(workdir)} if expected else ()
    return sum((tag, step) not in found for step, values in expected for tag in values)


def scalars(workdir: str | os.PathLike) -> list[tuple[str, int, float]]:
    """Tag, step and value of all scalars in the event files, in the order of files and records."""
    import tensorflow as tf

    found = []
    for path in sorted(pathlib.Path(workdir).glob('*tfevents*')):
        for record in _records(path):
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                if not value.HasField('tensor'):
                    continue
                array = tf.make_ndarray(value.tensor)
                if array.ndim == 0 and array.dtype.kind == 'f':
                    found.append((value.tag, event.step, float(array)))
    return found


def _records(path: pathlib.Path) -> Iterator[bytes]:
    """The records of a file, up to the first that is cut short or damaged."""
    import tensorflow as tf

    try:
        for record in tf.data.TFRecordDataset(str(path)):
            yield record.numpy()
    except tf.errors.DataLossError:
        return


def _is_whole(path: pathlib.Path, records: list[bytes]) -> bool:
    # Around the bytes of a record are its length, 8 bytes, and two checksums of 4.
    return path.stat().st_size == sum(len(record) + 16 for record in records)


def _stays(event, step: int, again: Collection[tuple[str, int]]) -> bool:
    """Whether an event is to stay; a run writes one value an event."""
    tags = [value.tag for value in event.summary.value]
    if any(tag.startswith(_ANEW) or (tag, event.step) in again for tag in tags):
        return False
    return event.step <= step or not any(tag.startswith(_AT_STEPS) for tag in tags)
