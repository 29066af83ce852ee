"""Labels before what clones print, also where a clone redraws a line."""

from __future__ import annotations

from sfparallel.vmm.output import REDRAWN_EVERY_S, LabelledOutput


class Shown:
    """What a clone's output becomes, with a clock that is set by hand."""

    def __init__(self, label: str = "[3] ") -> None:
        self.now = 100.0
        self.bytes = b""
        self.output = LabelledOutput(label, self._take, lambda: self.now)

    def _take(self, stream: int, data: bytes) -> None:
        self.bytes += data

    def feed(self, *pieces: bytes) -> bytes:
        for piece in pieces:
            self.output.feed(1, piece)
        taken, self.bytes = self.bytes, b""
        return taken


def test_lines_come_out_whole_with_their_ends() -> None:
    shown = Shown()
    assert shown.feed(b"one\ntw") == b"[3] one\n"
    assert shown.feed(b"o\r\n\nlast") == b"[3] two\r\n[3] \n"
    shown.output.close()
    assert shown.feed() == b"[3] last\n"


def test_a_progress_bar_comes_out_as_it_ended() -> None:
    shown = Shown()
    # As tqdm draws it: the carriage return comes before each state.
    assert shown.feed(b"\r  0%|    |", b"\r 50%|##  |", b"\r100%|####|") == b""
    assert shown.feed(b"\nnext\n") == b"[3] 100%|####|\n[3] next\n"
    # As others do: behind it. And a shorter state over a longer one leaves nothing of that.
    assert shown.feed(b"working hard\r", b"done\r", b"\n") == b"[3] done\r\n"


def test_an_erased_bar_leaves_nothing() -> None:
    shown = Shown()
    assert shown.feed(b"\r100%|####|", b"\r          \r") == b""
    shown.output.close()
    assert shown.feed() == b""


def test_a_long_bar_is_shown_now_and_then() -> None:
    shown = Shown()
    assert shown.feed(b"\r 1%", b"\r 2%") == b""
    shown.now += REDRAWN_EVERY_S
    assert shown.feed(b"\r 3%") == b"[3]  3%\n"
    assert shown.feed(b"\r 4%") == b""
    assert shown.feed(b"\n") == b"[3]  4%\n"


def test_an_endless_bar_needs_no_memory() -> None:
    shown = Shown()
    for number in range(20_000):
        shown.output.feed(1, b"\r%050d" % number)
    assert shown.feed() == b""
    assert len(shown.output._partial[1]) < 200


def test_the_cursor_stays_and_colours_too() -> None:
    shown = Shown()
    assert shown.feed(b"\x1b[1A\x1b[2K\x1b[32mgreen\x1b[0m\x1b[?25l\x1b[H\x1bc\n") == b"[3] \x1b[32mgreen\x1b[0m\n"
    assert shown.feed(b"|\b/\b-\n") == b"[3] |/-\n"


def test_without_a_label_everything_passes() -> None:
    text = b"\r10%\r20%\x1b[1A\x1b[2Kx\r\n\b"
    assert Shown("").feed(text) == text


def test_a_line_without_end_comes_out_in_pieces() -> None:
    shown = Shown()
    assert shown.feed(b"x" * 100_000) == b"[3] " + b"x" * 100_000
