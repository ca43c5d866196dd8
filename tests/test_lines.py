"""Streams are cut into lines, whatever comes."""

import time

import pytest

from torchrunx_ray.driver.output import lines
from torchrunx_ray.driver.output.lines import LineCutter


def test_lines_come_whole_whatever_the_pieces() -> None:
    text = b"one\ntwo\r\n\n\rthr\ree\nfour"
    for size in range(1, len(text)):
        cutter = LineCutter()
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        cuts = [cutter.cut(piece) for piece in pieces]
        assert "".join(cut.lines for cut in cuts) == "one\ntwo\n\nee\n"
        assert "".join(cut.verbatim for cut in cuts) == "one\ntwo\r\n\n\rthr\ree\n"
        end = cutter.cut(b"\n")
        assert (end.lines, end.verbatim) == ("four\n", "four\n")


def test_redrawn_line_is_verbatim_at_once_and_others_are_whole() -> None:
    cutter = LineCutter()
    assert cutter.cut(b"loss: ").verbatim == ""
    assert cutter.cut(b"0.5\nnext").verbatim == "loss: 0.5\n"
    assert cutter.cut(b" 1%\r").verbatim == "next 1%\r"
    assert cutter.cut(b"next 2%").verbatim == "next 2%"
    assert cutter.cut(b"\nlast").verbatim == "\n"
    assert cutter.cut(b"\n").verbatim == "last\n"


def test_character_may_come_in_two_pieces() -> None:
    cutter = LineCutter()
    data = "ä█\n".encode()
    assert "".join(cutter.cut(data[i : i + 1]).lines for i in range(len(data))) == "ä█\n"


def test_carriage_returns_cost_neither_memory_nor_time() -> None:
    def taken_s(times: int) -> float:
        cutter = LineCutter()
        begun = time.process_time()
        for _ in range(times):
            assert cutter.cut(b"\r" * 2000).lines == ""
        taken_s = time.process_time() - begun
        assert cutter.cut(b"done\n").lines == "done\n"
        return taken_s

    assert taken_s(2000) < 8 * taken_s(500), "four times as many"


def test_line_without_an_end_is_passed_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_LONGEST", 1000)
    cutter = LineCutter()
    taken = "".join(cutter.cut(b"x" * 100).lines for _ in range(100))
    assert taken.count("x") > 9000
    assert max(map(len, taken.splitlines())) <= 1100


def test_bar_is_taken_now_and_then_and_not_twice_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "_REDRAWN_S", 0.0)
    cutter = LineCutter()
    assert cutter.cut(b"\r50%").lines == "50%\n"
    assert cutter.cut(b"\r100%").lines == "100%\n"
    assert cutter.cut(b"\n").lines == ""
    assert cutter.cut(b"next\n").lines == "next\n"
    monkeypatch.setattr(lines, "_REDRAWN_S", 1000.0)
    cut = cutter.cut(b"\r1%\r2%")
    assert (cut.lines, cut.drawn) == ("", "2%")
    assert cutter.cut(b"\r3%\n").lines == "3%\n"


def test_bar_that_has_just_begun_is_no_line_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_REDRAWN_S", 0.0)
    cutter = LineCutter()
    assert cutter.cut(b"epoch 2\n\r  0%|").lines == "epoch 2\n"


def test_part_of_a_character_completes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_REDRAWN_S", 1000.0)
    cutter = LineCutter()
    assert cutter.cut(b"\r50%").lines == ""
    monkeypatch.setattr(lines, "_REDRAWN_S", 0.0)
    cut = cutter.cut("█".encode()[:1])
    assert (cut.verbatim, cut.lines, cut.drawn) == ("", "", "50%")
    assert cutter.cut("█".encode()[1:]).lines == "50%█\n"
