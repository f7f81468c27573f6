"""Event files for TensorBoard.

TensorBoard's own writer is not used: when the disk is full, its thread ends and every later call raises.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megapromoe.training.log_files import AppendedFile, LogFolder

_numbers = itertools.count()  # numbers the event files of this process


class EventFile:
    """A new event file in the folder `tensorboard/` of a run.

    Args:
        folder: the run directory.
        first_step: TensorBoard drops values of this step and later ones from earlier files.
    """

    def __init__(self, folder: LogFolder, first_step: int):
        # TensorBoard reads files in the order of their names; a run may start again within the same second.
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        owner = f"{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{owner}"
        self._file = AppendedFile(folder.path / "tensorboard" / name, folder)
        start = Event(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._write(Event(file_version="brain.Event:2"), start)

    def add(self, step: int, *summaries: Summary) -> None:
        """Writes the summaries of a step, created by `torch.utils.tensorboard.summary`."""
        self._write(*(Event(step=step, summary=summary) for summary in summaries))

    def close(self) -> None:
        """See `Log.close`."""
        self._file.close()

    def _write(self, *events: Event) -> None:
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self._file.write(records.getvalue())
