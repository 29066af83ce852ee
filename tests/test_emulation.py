"""What is done for emulated guests: only there, and without taking memory."""

from __future__ import annotations

import mmap

import pytest

from sfparallel.runtime import emulation
from tests.conftest import Sfrun


def test_nothing_is_done_on_a_real_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("no need to map anything")

    monkeypatch.setattr(emulation, "is_emulated", lambda: False)
    monkeypatch.setattr(mmap, "mmap", refuse)
    emulation.widen_tlb()


@pytest.mark.needs("qemu", "image", "root")
def test_guests_know_that_they_are_emulated_and_the_table_costs_no_memory(
    sfrun: Sfrun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SF_ACCEL", "tcg")
    sfrun(
        """
        import sfparallel as sf
        from sfparallel.runtime.emulation import is_emulated, widen_tlb

        def own_bytes():
            with open("/proc/self/smaps_rollup") as file:
                return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("Rss:", "Anonymous:")))

        def clone():
            known = is_emulated.cache_info().currsize  # before the fork
            before = own_bytes()
            widen_tlb()
            return known, is_emulated(), own_bytes() - before

        known, emulated, grown = sf.parallel(n=1)(clone)()[0]
        assert known == 1 and emulated and grown < 1 << 20, (known, emulated, grown)
        """,
    ).ok()  # fmt: skip
