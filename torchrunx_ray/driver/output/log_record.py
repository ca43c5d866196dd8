"""Conversion of workers' output to records of the driver's `logging`."""

import logging
import os
from typing import Any

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
    fields: dict[str, Any] = vars(record)
    fields["hostname"], fields["local_rank"], fields["rank"] = (
        who.hostname,
        who.local_rank,
        who.rank,
    )
    fields["is_first_host"], fields["run_name"] = who.is_first_host, run_name
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
    fields: dict[str, Any] = vars(made)
    fields["worker_logger"], fields["is_formatted"] = record.logger, record.is_configured
    return made
