"""Streams are cut into lines, whatever comes."""

import time

import pytest

from torchrunx_ray.driver.output import lines
from torchrunx_ray.driver.output.lines import LineCutter


def test_lines_come_whole_whatever_the_pieces() -> None:
    text = "one\ntwo\r\n\n\rthr\ree\nfour"
    for size in range(1, len(text)):
        cutter = LineCutter()
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert "".join(map(cutter.cut, pieces)) == "one\ntwo\n\nee\n"
        assert cutter.cut("\n") == "four\n"


def test_character_may_come_in_two_pieces() -> None:
    cutter = LineCutter()
    data = "ä█\n".encode()
    assert "".join(cutter.cut(cutter.decode(data[i : i + 1])) for i in range(len(data))) == "ä█\n"


def test_carriage_returns_cost_neither_memory_nor_time() -> None:
    def taken_s(times: int) -> float:
        cutter = LineCutter()
        begun = time.process_time()
        for _ in range(times):
            assert cutter.cut("\r" * 2000) == ""
        taken_s = time.process_time() - begun
        assert cutter.cut("done\n") == "done\n"
        return taken_s

    assert taken_s(2000) < 8 * taken_s(500), "four times as many"


def test_line_without_an_end_is_passed_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_LONGEST", 1000)
    cutter = LineCutter()
    taken = "".join(cutter.cut("x" * 100) for _ in range(100))
    assert taken.count("x") > 9000
    assert max(map(len, taken.splitlines())) <= 1100


def test_bar_is_taken_now_and_then_and_not_twice_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "_REDRAWN_S", 0.0)
    cutter = LineCutter()
    assert cutter.cut("\r50%") == "50%\n"
    assert cutter.cut("\r100%") == "100%\n"
    assert cutter.cut("\n") == ""
    assert cutter.cut("next\n") == "next\n"
    monkeypatch.setattr(lines, "_REDRAWN_S", 1000.0)
    assert cutter.cut("\r1%\r2%") == ""
    assert cutter.drawn == "2%"
    assert cutter.cut("\r3%\n") == "3%\n"
