"""The boot of a template's guest."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sfparallel.errors import GuestError
from sfparallel.vmm import template


def boots(monkeypatch: pytest.MonkeyPatch, *results: Any) -> None:
    """Have boots end as told, one after the other."""
    left = list(results)

    async def boot(*_: object) -> Any:
        result = left.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(template, "_boot", boot)


def booted(said: list[str]) -> Any:
    return asyncio.run(template._booted(None, None, said.append))  # type: ignore[arg-type]


def test_a_guest_that_does_not_come_up_is_booted_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    boots(monkeypatch, GuestError("template: the guest agent did not answer"), "a VM")
    assert booted(said) == "a VM"
    assert said == ["template: the guest agent did not answer; booting it once more"]


def test_a_guest_that_never_comes_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    boots(monkeypatch, GuestError("the first"), GuestError("the second"), "a VM")
    with pytest.raises(GuestError, match="the second"):
        booted(said)
    assert said == ["the first; booting it once more"]
