"""A clock that is wrong, for all processes that are started with it."""

import shutil
import subprocess
from pathlib import Path

_SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += atoi(getenv("SHIFTED_CLOCK_S"));
    return result;
}
"""


def compiler() -> str | None:
    return shutil.which("cc")


def shifted_clock(seconds: int, folder: Path) -> dict[str, str]:
    """The environment that makes the clock of whoever has it wrong by so much."""
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(_SOURCE)
    command = [str(compiler()), "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library), "SHIFTED_CLOCK_S": str(seconds)}
