"""Table that each script prints with its measurements."""

import statistics
from collections.abc import Callable, Mapping, Sequence


def print_table(
    head: str,
    measured: Mapping[str, Sequence[float]],
    *,
    digits: int = 3,
    last_head: str = "",
    last: Callable[[str, float], str] = lambda _name, _median: "",
) -> None:
    """Print a row for each measurement; `last` makes the last column from its name and median."""
    width = max(map(len, (head, *measured))) + 2
    print(
        f"{head:{width}}{'median':>11}{'lowest':>11}{'highest':>11}{'n':>4}   {last_head}".rstrip()
    )
    for name, seen in measured.items():
        median = statistics.median(seen)
        figures = "".join(f"{value:11,.{digits}f}" for value in (median, min(seen), max(seen)))
        print(f"{name:{width}}{figures}{len(seen):4}   {last(name, median)}".rstrip(), flush=True)
