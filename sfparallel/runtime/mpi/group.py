"""Groups: processes in an order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from sfparallel.runtime.mpi.constants import IDENT, PROC_NULL, SIMILAR, UNDEFINED, UNEQUAL
from sfparallel.runtime.mpi.errors import ERR_ARG, ERR_GROUP, ERR_RANK, MPIException
from sfparallel.runtime.mpi.handle import Core, Handle, predefined


class GroupCore(Core):
    """Processes (numbers in the world), and which of them this one is."""

    def __init__(self, ranks: Sequence[int], me: int) -> None:
        self.ranks = tuple(ranks)
        self.me = me


class Group(Handle):
    """A group (mpi4py's `MPI.Group`)."""

    _invalid: ClassVar[int] = ERR_GROUP
    _null_name = "GROUP_NULL"
    _core: GroupCore | None

    def _like(self, ranks: Sequence[int]) -> Self:
        me: int = self._live().me
        return type(self)._of(GroupCore(ranks, me) if ranks else GROUP_EMPTY._core)

    @property
    def _ranks(self) -> tuple[int, ...]:
        ranks: tuple[int, ...] = self._live().ranks
        return ranks

    def Get_size(self) -> int:
        return len(self._ranks)

    def Get_rank(self) -> int:
        core = self._live()
        return core.ranks.index(core.me) if core.me in core.ranks else UNDEFINED

    size = property(Get_size)
    rank = property(Get_rank)

    def Translate_ranks(self, ranks: Sequence[int] | None = None, group: Group | None = None) -> list[int]:
        """The ranks that members have in another group; UNDEFINED for those who are not there."""
        own = self._ranks
        if group is None:
            from sfparallel.runtime.mpi.comm import COMM_WORLD
            group = COMM_WORLD.Get_group()
        there = {world: rank for rank, world in enumerate(group._ranks)}
        wanted = range(len(own)) if ranks is None else ranks
        return [PROC_NULL if rank == PROC_NULL else there.get(own[_check(rank, own)], UNDEFINED) for rank in wanted]

    def Compare(self, group: Group) -> int:
        mine, theirs = self._ranks, group._ranks
        return IDENT if mine == theirs else SIMILAR if set(mine) == set(theirs) else UNEQUAL

    def Dup(self) -> Self:
        core = self._live()
        return type(self)._of(GroupCore(core.ranks, core.me))

    @classmethod
    def Union(cls, group1: Group, group2: Group) -> Self:
        first, second = group1._ranks, group2._ranks
        return cls._joined(group1, group2, [*first, *(rank for rank in second if rank not in set(first))])

    @classmethod
    def Intersection(cls, group1: Group, group2: Group) -> Self:
        second = set(group2._ranks)
        return cls._joined(group1, group2, [rank for rank in group1._ranks if rank in second])

    Intersect = Intersection

    @classmethod
    def Difference(cls, group1: Group, group2: Group) -> Self:
        second = set(group2._ranks)
        return cls._joined(group1, group2, [rank for rank in group1._ranks if rank not in second])

    @classmethod
    def _joined(cls, group1: Group, group2: Group, ranks: list[int]) -> Self:
        me = max(group1._live().me, group2._live().me)
        return cls._of(GroupCore(ranks, me) if ranks else GROUP_EMPTY._core)

    def Incl(self, ranks: Sequence[int]) -> Self:
        own = self._ranks
        return self._like([own[_check(rank, own)] for rank in _distinct(ranks)])

    def Excl(self, ranks: Sequence[int]) -> Self:
        own = self._ranks
        out = {_check(rank, own) for rank in _distinct(ranks)}
        return self._like([world for rank, world in enumerate(own) if rank not in out])

    def Range_incl(self, ranks: Sequence[tuple[int, int, int]]) -> Self:
        return self.Incl(_ranges(ranks))

    def Range_excl(self, ranks: Sequence[tuple[int, int, int]]) -> Self:
        return self.Excl(_ranges(ranks))

    @classmethod
    def Create_from_session_pset(cls, session: Any, pset_name: str) -> Self:
        return cls._of(session.Create_group(pset_name)._core)

    def Free(self) -> None:
        self._live()
        if self._is_constant:
            raise MPIException(ERR_GROUP, "a predefined group cannot be freed")
        self._core = None


def _check(rank: int, own: tuple[int, ...]) -> int:
    if not 0 <= rank < len(own):
        raise MPIException(ERR_RANK, f"{rank} in a group of {len(own)}")
    return rank


def _distinct(ranks: Sequence[int]) -> list[int]:
    distinct = list(ranks)
    if len(set(distinct)) != len(distinct):
        raise MPIException(ERR_RANK, "a rank is named twice")
    return distinct


def _ranges(ranges: Sequence[tuple[int, int, int]]) -> list[int]:
    ranks: list[int] = []
    for first, last, stride in ranges:
        if stride == 0:
            raise MPIException(ERR_ARG, "a stride of 0")
        ranks += range(first, last + (1 if stride > 0 else -1), stride)
    return ranks


GROUP_NULL: Group = predefined(Group(), "GROUP_NULL")
GROUP_EMPTY: Group = predefined(Group._of(GroupCore((), -1)), "GROUP_EMPTY")
