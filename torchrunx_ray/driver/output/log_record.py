"""Conversion of workers' output to records of the driver's `logging`."""

import logging
import os

from torchrunx_ray.driver.output.speaker import Speaker
from torchrunx_ray.wire.records import WorkerRecord


def new_record(
    run_name: str, who: Speaker, level: int, level_name: str, created: float, text: str
) -> logging.LogRecord:
    """Return a record of the logger that is named after the worker."""
    record = logging.LogRecord(who.logger_name, level, who.label, 0, text, None, None)
    record.created = created
    record.msecs = float(int(created % 1 * 1000))
    record.levelname = level_name
    vars(record).update(
        hostname=who.hostname,
        local_rank=who.local_rank,
        rank=who.rank,
        is_first_host=who.is_first_host,
        run_name=run_name,
    )
    return record


def as_log_record(run_name: str, who: Speaker, record: WorkerRecord) -> logging.LogRecord:
    """Return a copy of a worker's record, for the driver's logger of that worker.

    `worker_logger` is the name of its logger in the worker. `is_formatted` is True if the worker's function
    has formatted the text.
    """
    made = new_record(run_name, who, record.level, record.level_name, record.created, record.text)
    made.pathname, made.lineno = record.path or "", record.line or 0
    made.funcName = record.function or ""
    made.filename = os.path.basename(made.pathname)
    made.module = os.path.splitext(made.filename)[0]
    vars(made).update(worker_logger=record.logger, is_formatted=record.is_configured)
    return made
