"""Stacks of the workers, and their summary in words."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<function>.*)')
_OURS = "/torchrunx_ray/worker/"
_AFTER_THE_FUNCTION = {
    "_hand_over": "has returned, and its value is being copied",
    "_join_threads": "has left the function, and waits for threads that the function started",
    "_end": "has left the function, and is ending",
}
"""Words for functions of torchrunx_ray.worker that a worker calls after the user's function."""

_NOT_THE_USERS = re.compile(
    r"/site-packages/|/dist-packages/|/lib/python3[^/]*/|^<frozen "
    r"|/torchrunx_ray/(worker|wire|driver|agent|integrations|torchrunx)/"
)


@dataclass(frozen=True)
class Frame:
    """One call on a stack."""

    function: str
    file: str
    line: str

    @property
    def position(self) -> str:
        return f"{PurePath(self.file).name}:{self.line}"

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"


class Stacks:
    """The Python stacks of a run's workers at one moment. As text, equal stacks are grouped.

    `by_rank` has the stacks of all threads of each worker, as faulthandler prints them. The text is empty if
    the worker did not answer. `returned` has the ranks that are known to have left the function.
    """

    def __init__(self, by_rank: Mapping[int, str], returned: Collection[int] = ()) -> None:
        self.by_rank = dict(sorted(by_rank.items()))
        self._returned = frozenset(returned)

    @cached_property
    def groups(self) -> list[tuple[list[int], tuple[Frame, ...]]]:
        """Groups of ranks whose main threads have equal stacks, each with these calls, the innermost first."""
        groups: dict[tuple[Frame, ...], list[int]] = {}
        for rank, text in self.by_rank.items():
            groups.setdefault(_main_thread(text), []).append(rank)
        return [(ranks, frames) for frames, ranks in groups.items()]

    @property
    def summary(self) -> str:
        """One line for each group: "ranks 0, 2-7: train (train.py:33), in all_reduce"."""
        return "\n".join(line for line, _ in self._lines())

    def without(self, ranks: Iterable[int]) -> "Stacks":
        left_out = set(ranks)
        by_rank = {rank: text for rank, text in self.by_rank.items() if rank not in left_out}
        return Stacks(by_rank, self._returned)

    def __bool__(self) -> bool:
        return bool(self.by_rank)

    def __str__(self) -> str:
        lines: list[str] = []
        for line, frames in self._lines():
            lines.append(line)
            lines += [f"  {frame}" for frame in frames]
        return "\n".join(lines)

    def _lines(self) -> list[tuple[str, tuple[Frame, ...]]]:
        """Return a line for each group. A rank that does not answer, but has returned, is apart from the others."""
        lines: list[tuple[str, tuple[Frame, ...]]] = []
        for ranks, frames in self.groups:
            returned = [] if frames else [rank for rank in ranks if rank in self._returned]
            if returned:
                lines.append((f"{in_words(returned)}: has returned", frames))
            if others := [rank for rank in ranks if rank not in returned]:
                lines.append((f"{in_words(others)}: {_where(frames)}", frames))
        return lines

    def __repr__(self) -> str:
        return f"<Stacks of {in_words(self.by_rank)}>"


def in_words(ranks: Iterable[int]) -> str:
    """Return words such as "ranks 0, 2-7", or "rank 3"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    words = [f"{first}" if first == last else f"{first}-{last}" for first, last in runs]
    is_one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"rank{'' if is_one else 's'} {', '.join(words)}"


def threads_in_words(text: str) -> list[str]:
    """Return where the main thread is ("" if the worker did not answer), then where its other threads are.

    Threads without a line of the user are left out.
    """
    main = _main_thread(text)
    *others, _ = text.rstrip().split("\n\n")
    frames = [tuple(_frames(block)) for block in others]
    return [
        _where(main) if main else "",
        *(_where(each) for each in frames if any(map(_is_users, each))),
    ]


def _frames(block: str) -> Iterator[Frame]:
    for match in _FRAME.finditer(block):
        yield Frame(match["function"], match["file"], match["line"])


def _is_users(frame: Frame) -> bool:
    return not _NOT_THE_USERS.search(frame.file)


def _main_thread(text: str) -> tuple[Frame, ...]:
    """Return the main thread's calls, from the innermost out to the user's function.

    The main thread is the last in the text.
    """
    block = text.rstrip().rpartition("\n\n")[2]
    frames: list[Frame] = []
    for frame in _frames(block):
        if _OURS in frame.file and frame.function in _AFTER_THE_FUNCTION:
            return (*frames, frame)
        if _OURS in frame.file and frames:
            break
        frames.append(frame)
    return tuple(frames)


def _where(frames: tuple[Frame, ...]) -> str:
    """Return the innermost function of the user, and the function that it waits in.

    For example: "train (train.py:7), in select".
    """
    if not frames:
        return "no answer (the worker has not started, has just ended, or is blocked in the kernel)"
    if _OURS in frames[-1].file and frames[-1].function in _AFTER_THE_FUNCTION:
        return f"{_AFTER_THE_FUNCTION[frames[-1].function]}: {frames[0].function} ({frames[0].position})"
    own = next(filter(_is_users, frames), frames[0])
    where = f"{own.function} ({own.position})"
    return where if own is frames[0] else f"{where}, in {frames[0].function}"
