"""`MPI.Datatype`, the predefined datatypes, and the tables by which types are found from type codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

from sfparallel.runtime.mpi import constants as c
from sfparallel.runtime.mpi import datatype as make
from sfparallel.runtime.mpi.attributes import Attributes, Keyvals
from sfparallel.runtime.mpi.buffers import Bytes, byte_array
from sfparallel.runtime.mpi.datatype import TypeCore, check_type
from sfparallel.runtime.mpi.errors import CODES, ERR_ARG, ERR_TYPE, MPIException
from sfparallel.runtime.mpi.handle import Handle, predefined

_COMBINERS = {value: name.removeprefix("COMBINER_") for name, value in vars(c).items() if name.startswith("COMBINER_")}
_KEYVALS = Keyvals()


class Datatype(Attributes, Handle):
    """A datatype (mpi4py's `MPI.Datatype`)."""

    _invalid = ERR_TYPE
    _null_name = "DATATYPE_NULL"
    _keyvals: ClassVar[Keyvals] = _KEYVALS

    def __reduce__(self) -> str | tuple[Any, ...]:
        core = self._core
        if core is None or core.combiner == c.COMBINER_NAMED:
            return super().__reduce__()
        base, combiner, parameters = self.decode()
        return _recreate, (base, combiner, parameters)

    @classmethod
    def _made(cls, core: TypeCore) -> Self:
        return cls._of(core)

    # What it is

    def Get_size(self) -> int:
        """Bytes of data in one element."""
        return check_type(self._core).size

    def Get_extent(self) -> tuple[int, int]:
        """Lower bound and extent."""
        core = check_type(self._core)
        return core.lb, core.extent

    def Get_true_extent(self) -> tuple[int, int]:
        """First byte of data, and number of bytes to the last one."""
        core = check_type(self._core)
        return core.true_lb, core.true_extent

    size = property(Get_size)
    lb = property(lambda self: self.Get_extent()[0])
    extent = property(lambda self: self.Get_extent()[1])
    ub = property(lambda self: sum(self.Get_extent()))
    true_lb = property(lambda self: self.Get_true_extent()[0])
    true_extent = property(lambda self: self.Get_true_extent()[1])
    true_ub = property(lambda self: sum(self.Get_true_extent()))

    def Get_name(self) -> str:
        return "MPI_DATATYPE_NULL" if self._core is None else str(self._core.name)

    def Set_name(self, name: str) -> None:
        check_type(self._core).name = name[:c.MAX_OBJECT_NAME - 1]

    name = property(Get_name, Set_name)

    def Get_envelope(self) -> tuple[int, int, int, int, int]:
        """Numbers of integers, addresses, counts and types in `Get_contents`, and the combiner."""
        core = check_type(self._core)
        integers, addresses, counts, types = core.contents
        return len(integers), len(addresses), len(counts), len(types), core.combiner

    def Get_contents(self) -> tuple[list[int], list[int], list[int], list[Datatype]]:
        """The arguments by which it was made."""
        core = check_type(self._core)
        if core.combiner == c.COMBINER_NAMED:
            raise MPIException(ERR_TYPE, "a named type has no contents")
        integers, addresses, counts, types = core.contents
        return list(integers), list(addresses), list(counts), [_object(each) for each in types]

    envelope = property(Get_envelope)
    contents = property(Get_contents)
    combiner = property(lambda self: self.Get_envelope()[-1])

    @property
    def is_named(self) -> bool:
        return bool(self.combiner == c.COMBINER_NAMED)

    @property
    def is_predefined(self) -> bool:
        if self._core is None:
            return True
        named = (c.COMBINER_NAMED, c.COMBINER_F90_INTEGER, c.COMBINER_F90_REAL, c.COMBINER_F90_COMPLEX)
        return self.combiner in named

    @property
    def typechar(self) -> str:
        return make.type_code(check_type(self._core))[0] or "V"

    @property
    def typestr(self) -> str:
        core = check_type(self._core)
        return make.type_code(core)[1] or f"V{core.extent}"

    def tocode(self) -> str:
        """The type code (numpy's, or the struct module's)."""
        code = make.type_code(self._core)[0] if self._core is not None else ""
        if not code:
            raise ValueError("cannot map to character code or type string")
        return code

    @classmethod
    def fromcode(cls, code: str) -> Datatype:
        """The type of a type code."""
        try:
            return _typedict[code]
        except KeyError:
            raise ValueError(f"cannot map code {code!r} to MPI datatype") from None

    def decode(self) -> tuple[Datatype, str, dict[str, Any]]:
        """The type it was made of, the combiner's name, and the other arguments by name."""
        core = check_type(self._core)
        name = _COMBINERS[core.combiner]
        if core.combiner == c.COMBINER_NAMED:
            return self, name, {}
        integers, addresses, _, types = core.contents
        base = _object(types[0]) if len(types) == 1 and core.combiner != c.COMBINER_STRUCT else DATATYPE_NULL
        return base, name, _PARAMETERS[core.combiner](integers, addresses, [_object(each) for each in types])

    # Making others

    def Dup(self) -> Self:
        core = check_type(self._core)
        copy = make.duplicate(core)
        self._copy_attributes(core, copy)
        return self._made(copy)

    Create_dup = Dup

    def Create_contiguous(self, count: int) -> Self:
        return self._made(make.contiguous(check_type(self._core), _count(count)))

    def Create_vector(self, count: int, blocklength: int, stride: int) -> Self:
        core = check_type(self._core)
        places = [i * stride * core.extent for i in range(_count(count))]
        return self._made(make.blocks(core, [_count(blocklength)] * count, places, c.COMBINER_VECTOR,
                                      ([count, blocklength, stride], [], [], [core])))

    def Create_hvector(self, count: int, blocklength: int, stride: int) -> Self:
        core = check_type(self._core)
        places = [i * stride for i in range(_count(count))]
        return self._made(make.blocks(core, [_count(blocklength)] * count, places, c.COMBINER_HVECTOR,
                                      ([count, blocklength], [stride], [], [core])))

    def Create_indexed(self, blocklengths: Sequence[int], displacements: Sequence[int]) -> Self:
        core = check_type(self._core)
        lengths, places = _equally_long(blocklengths, displacements)
        return self._made(make.blocks(core, lengths, [place * core.extent for place in places], c.COMBINER_INDEXED,
                                      ([len(lengths), *lengths, *places], [], [], [core])))

    def Create_hindexed(self, blocklengths: Sequence[int], displacements: Sequence[int]) -> Self:
        core = check_type(self._core)
        lengths, places = _equally_long(blocklengths, displacements)
        return self._made(make.blocks(core, lengths, places, c.COMBINER_HINDEXED, ([len(lengths), *lengths], places, [], [core])))

    def Create_indexed_block(self, blocklength: int, displacements: Sequence[int]) -> Self:
        core = check_type(self._core)
        places = [int(each) for each in displacements]
        return self._made(make.blocks(core, [blocklength] * len(places), [place * core.extent for place in places],
                                      c.COMBINER_INDEXED_BLOCK, ([len(places), blocklength, *places], [], [], [core])))

    def Create_hindexed_block(self, blocklength: int, displacements: Sequence[int]) -> Self:
        core = check_type(self._core)
        places = [int(each) for each in displacements]
        return self._made(make.blocks(core, [blocklength] * len(places), places, c.COMBINER_HINDEXED_BLOCK,
                                      ([len(places), blocklength], places, [], [core])))

    @classmethod
    def Create_struct(cls, blocklengths: Sequence[int], displacements: Sequence[int], datatypes: Sequence[Datatype]) -> Self:
        lengths, places = _equally_long(blocklengths, displacements)
        if len(datatypes) != len(lengths):
            raise ValueError(f"expecting {len(lengths)} datatypes, got {len(datatypes)}")
        return cls._made(make.struct_of(lengths, places, [check_type(each._core) for each in datatypes]))

    def Create_subarray(self, sizes: Sequence[int], subsizes: Sequence[int], starts: Sequence[int],
                        order: int = c.ORDER_C) -> Self:
        return self._made(make.subarray(check_type(self._core), sizes, subsizes, starts, order))

    def Create_darray(self, size: int, rank: int, gsizes: Sequence[int], distribs: Sequence[int], dargs: Sequence[int],
                      psizes: Sequence[int], order: int = c.ORDER_C) -> Self:
        return self._made(make.darray(check_type(self._core), size, rank, gsizes, distribs, dargs, psizes, order))

    def Create_resized(self, lb: int, extent: int) -> Self:
        return self._made(make.resized(check_type(self._core), lb, extent))

    Resized = Create_resized

    @classmethod
    def Get_value_index(cls, value: Datatype, index: Datatype) -> Self:
        """The pair type for MAXLOC and MINLOC; null if there is none."""
        check_type(value._core)
        return cls._of(_PAIRS.get(value._core) if check_type(index._core) is INT._core else None)

    @classmethod
    def Create_f90_integer(cls, r: int) -> Self:
        for digits, name in ((2, "i1"), (4, "i2"), (9, "i4"), (18, "i8")):
            if r <= digits:
                return cls._of(_f90(c.COMBINER_F90_INTEGER, [r], _typedict[name]._core))
        raise MPIException(ERR_ARG, f"no integer type has a range of {r}")

    @classmethod
    def Create_f90_real(cls, p: int, r: int) -> Self:
        return cls._of(_f90(c.COMBINER_F90_REAL, [p, r], FLOAT._core if _is_single(p, r) else DOUBLE._core))

    @classmethod
    def Create_f90_complex(cls, p: int, r: int) -> Self:
        base = C_FLOAT_COMPLEX if _is_single(p, r) else C_DOUBLE_COMPLEX
        return cls._of(_f90(c.COMBINER_F90_COMPLEX, [p, r], base._core))

    @classmethod
    def Match_size(cls, typeclass: int, size: int) -> Self:
        """The type of a class and size."""
        prefix = {c.TYPECLASS_LOGICAL: "LOGICAL", c.TYPECLASS_INTEGER: "INTEGER", c.TYPECLASS_REAL: "REAL",
                  c.TYPECLASS_COMPLEX: "COMPLEX"}.get(typeclass)
        core = NAMED[f"{prefix}{size}"]._core if f"{prefix}{size}" in NAMED else None
        if core is None:
            raise MPIException(ERR_ARG, f"no type of class {typeclass} has {size} bytes")
        return cls._of(core)

    def Commit(self) -> Self:
        check_type(self._core)
        return self

    def Free(self) -> None:
        core = check_type(self._core)
        if self.is_predefined:
            raise MPIException(ERR_TYPE, "a predefined type cannot be freed")
        self._delete_attributes(core)
        self._core = None

    def _release(self) -> None:
        self._delete_attributes(self._core)

    # Packing

    def Pack(self, inbuf: Any, outbuf: Any, position: int, comm: Any) -> int:
        """Pack a buffer; the position behind it."""
        from sfparallel.runtime.mpi.messages import simple
        comm._live()
        data, core = byte_array(inbuf, readonly=True), check_type(self._core)
        packed = simple([data, _elements(data, core), self], readonly=True).read()
        out = byte_array(outbuf, readonly=False)
        if position < 0 or position + len(packed) > len(out):
            raise MPIException(CODES["ERR_TRUNCATE"], "the packed data does not fit into the buffer")
        out[position:position + len(packed)] = packed
        return position + len(packed)

    def Unpack(self, inbuf: Any, position: int, outbuf: Any, comm: Any) -> int:
        """Unpack into a buffer; the position behind what was used."""
        from sfparallel.runtime.mpi.messages import simple
        comm._live()
        data, core = byte_array(outbuf, readonly=False), check_type(self._core)
        block = simple([data, _elements(data, core), self], readonly=False)
        packed = byte_array(inbuf, readonly=True)
        if position < 0 or position + block.nbytes > len(packed):
            raise MPIException(CODES["ERR_TRUNCATE"], "the buffer holds less than that")
        block.core.unpack(packed[position:position + block.nbytes], block.data, block.origin, block.count)
        return position + block.nbytes

    def Pack_size(self, count: int, comm: Any) -> int:
        comm._live()
        return count * check_type(self._core).size

    def Pack_external(self, datarep: str, inbuf: Any, outbuf: Any, position: int) -> int:
        """Pack in the standard's representation (big endian)."""
        _check_external(datarep)
        data, core = byte_array(inbuf, readonly=True), check_type(self._core)
        packed = _swapped(core.pack(data, 0, _elements(data, core)), core)
        out = byte_array(outbuf, readonly=False)
        out[position:position + len(packed)] = packed
        return position + len(packed)

    def Unpack_external(self, datarep: str, inbuf: Any, position: int, outbuf: Any) -> int:
        """Unpack from the standard's representation."""
        _check_external(datarep)
        data, core = byte_array(outbuf, readonly=False), check_type(self._core)
        count = _elements(data, core)
        packed = byte_array(inbuf, readonly=True)[position:position + count * core.size]
        if position < 0 or len(packed) != count * core.size:
            raise MPIException(CODES["ERR_TRUNCATE"], "the buffer holds less than that")
        core.unpack(_swapped(packed, core), data, 0, count)
        return position + len(packed)

    def Pack_external_size(self, datarep: str, count: int) -> int:
        _check_external(datarep)
        return count * check_type(self._core).size


def _check_external(datarep: str) -> None:
    if datarep != "external32":
        raise MPIException(ERR_ARG, f"no such data representation: {datarep}")


def _elements(data: Bytes, core: TypeCore) -> int:
    if core.extent <= 0:
        return 0
    # The last element needs its data only, not its whole extent.
    return (len(data) - core.true_lb - core.true_extent) // core.extent + 1 if len(data) else 0


def _swapped(packed: Bytes, core: TypeCore) -> Bytes:
    """Packed data in the other byte order."""
    out = packed.copy()
    at = 0
    sizes = core.basic_sizes(halves=True)
    if len(set(sizes)) == 1:
        return out.reshape(-1, sizes[0])[:, ::-1].ravel()
    while sizes and at < len(out):
        for size in sizes:
            out[at:at + size] = out[at:at + size][::-1]
            at += size
    return out


def _recreate(base: Datatype, combiner: str, parameters: dict[str, Any]) -> Datatype:
    if combiner == "VALUE_INDEX":
        return Datatype.Get_value_index(**parameters)
    if combiner == "DUP":
        return base.Dup()
    made = getattr(base or Datatype, f"Create_{combiner.lower()}")(**parameters)
    assert isinstance(made, Datatype)
    return made


def _object(core: TypeCore) -> Datatype:
    return _OBJECTS.get(core) or Datatype._of(core)


def _count(count: int) -> int:
    if count < 0:
        raise MPIException(CODES["ERR_COUNT"], f"{count}")
    return count


def _equally_long(blocklengths: Sequence[int], displacements: Sequence[int]) -> tuple[list[int], list[int]]:
    lengths, places = [int(each) for each in blocklengths], [int(each) for each in displacements]
    if len(lengths) != len(places):
        raise ValueError(f"expecting {len(lengths)} displacements, got {len(places)}")
    return lengths, places


def _is_single(p: int, r: int) -> bool:
    return (p == c.UNDEFINED or p <= 6) and (r == c.UNDEFINED or r <= 37)


_F90: dict[tuple[int, ...], TypeCore] = {}


def _f90(combiner: int, arguments: list[int], base: TypeCore) -> TypeCore:
    key = (combiner, *arguments)
    if key not in _F90:
        _F90[key] = TypeCore(base.offsets, base.lengths, 0, base.extent, combiner=combiner, contents=(arguments, [], [], []),
                             dtype=base.dtype, char=base.char, kind=base.kind, align=base.align)
    return _F90[key]


def _subarray_parameters(i: list[int], _a: list[int], _t: list[Datatype]) -> dict[str, Any]:
    n = i[0]
    return {"sizes": i[1:1 + n], "subsizes": i[1 + n:1 + 2 * n], "starts": i[1 + 2 * n:1 + 3 * n], "order": i[-1]}


def _darray_parameters(i: list[int], _a: list[int], _t: list[Datatype]) -> dict[str, Any]:
    n = i[2]
    lists = [i[3 + k * n:3 + (k + 1) * n] for k in range(4)]
    return {"size": i[0], "rank": i[1], "gsizes": lists[0], "distribs": lists[1], "dargs": lists[2], "psizes": lists[3],
            "order": i[-1]}


_PARAMETERS: dict[int, Callable[[list[int], list[int], list[Datatype]], dict[str, Any]]] = {
    c.COMBINER_DUP: lambda i, a, t: {},
    c.COMBINER_CONTIGUOUS: lambda i, a, t: {"count": i[0]},
    c.COMBINER_VECTOR: lambda i, a, t: {"count": i[0], "blocklength": i[1], "stride": i[2]},
    c.COMBINER_HVECTOR: lambda i, a, t: {"count": i[0], "blocklength": i[1], "stride": a[0]},
    c.COMBINER_INDEXED: lambda i, a, t: {"blocklengths": i[1:1 + i[0]], "displacements": i[1 + i[0]:]},
    c.COMBINER_HINDEXED: lambda i, a, t: {"blocklengths": i[1:], "displacements": list(a)},
    c.COMBINER_INDEXED_BLOCK: lambda i, a, t: {"blocklength": i[1], "displacements": i[2:]},
    c.COMBINER_HINDEXED_BLOCK: lambda i, a, t: {"blocklength": i[1], "displacements": list(a)},
    c.COMBINER_STRUCT: lambda i, a, t: {"blocklengths": i[1:], "displacements": list(a), "datatypes": t},
    c.COMBINER_SUBARRAY: _subarray_parameters,
    c.COMBINER_DARRAY: _darray_parameters,
    c.COMBINER_RESIZED: lambda i, a, t: {"lb": a[0], "extent": a[1]},
    c.COMBINER_VALUE_INDEX: lambda i, a, t: {"value": t[0], "index": t[1]},
    c.COMBINER_F90_INTEGER: lambda i, a, t: {"r": i[0]},
    c.COMBINER_F90_REAL: lambda i, a, t: {"p": i[0], "r": i[1]},
    c.COMBINER_F90_COMPLEX: lambda i, a, t: {"p": i[0], "r": i[1]},
}

# name, numpy type, type code, kind; sizes of the C types of x86-64 Linux and of gfortran's default types.
_ELEMENTARY = """
PACKED u1 B u,BYTE u1 B u,AINT i8 p i,OFFSET i8 p i,COUNT i8 p i,CHAR S1 c S,WCHAR u4 U U,SIGNED_CHAR i1 b i,SHORT i2 h i
INT i4 i i,LONG i8 l i,LONG_LONG i8 q i,UNSIGNED_CHAR u1 B u,UNSIGNED_SHORT u2 H u,UNSIGNED u4 I u,UNSIGNED_LONG u8 L u
UNSIGNED_LONG_LONG u8 Q u,FLOAT f4 f f,DOUBLE f8 d f,LONG_DOUBLE g g f,C_BOOL ?1 ? b,INT8_T i1 b i,INT16_T i2 h i,INT32_T i4 i i
INT64_T i8 l i,UINT8_T u1 B u,UINT16_T u2 H u,UINT32_T u4 I u,UINT64_T u8 L u,FLOAT16_T f2 e f,FLOAT32_T f4 f f,FLOAT64_T f8 d f
C_COMPLEX c8 F c,C_FLOAT_COMPLEX c8 F c,C_DOUBLE_COMPLEX c16 D c,C_LONG_DOUBLE_COMPLEX G G c,CXX_BOOL ?1 ? b
CXX_FLOAT_COMPLEX c8 F c,CXX_DOUBLE_COMPLEX c16 D c,CXX_LONG_DOUBLE_COMPLEX G G c,CHARACTER S1 c S,LOGICAL i4 i i,INTEGER i4 i i
REAL f4 f f,DOUBLE_PRECISION f8 d f,COMPLEX c8 F c,DOUBLE_COMPLEX c16 D c,LOGICAL1 ?1 ? b,LOGICAL2 i2 h i,LOGICAL4 i4 i i
LOGICAL8 i8 l i,INTEGER1 i1 b i,INTEGER2 i2 h i,INTEGER4 i4 i i,INTEGER8 i8 l i,REAL2 f2 e f,REAL4 f4 f f,REAL8 f8 d f
REAL16 g g f,COMPLEX8 c8 F c,COMPLEX16 c16 D c,COMPLEX32 G G c
"""
LOGICAL_NAMES = ("C_BOOL", "CXX_BOOL", "LOGICAL", "LOGICAL1", "LOGICAL2", "LOGICAL4", "LOGICAL8")
_PAIR_VALUES = {"SHORT": "i2", "INT": "i4", "LONG": "i8", "FLOAT": "f4", "DOUBLE": "f8", "LONG_DOUBLE": "g"}
_ABSENT = ("LOGICAL16", "INTEGER16", "COMPLEX4", "BFLOAT16_T")
_ALIASES = {
    "TWOINT": "INT_INT", "UNSIGNED_INT": "UNSIGNED", "SIGNED_SHORT": "SHORT", "SIGNED_INT": "INT", "SIGNED_LONG": "LONG",
    "SIGNED_LONG_LONG": "LONG_LONG", "BOOL": "C_BOOL", "SINT8_T": "INT8_T", "SINT16_T": "INT16_T", "SINT32_T": "INT32_T",
    "SINT64_T": "INT64_T", "F_BOOL": "LOGICAL", "F_INT": "INTEGER", "F_FLOAT": "REAL", "F_DOUBLE": "DOUBLE_PRECISION",
    "F_COMPLEX": "COMPLEX", "F_FLOAT_COMPLEX": "COMPLEX", "F_DOUBLE_COMPLEX": "DOUBLE_COMPLEX",
}


def _predefined() -> dict[str, Datatype]:
    made: dict[str, Datatype] = {"DATATYPE_NULL": predefined(Datatype(), "DATATYPE_NULL")}
    for entry in _ELEMENTARY.replace("\n", ",").split(","):
        if entry:
            name, dtype, char, kind = entry.split()
            align = 8 if dtype == "c16" else 4 if dtype in ("c8", "S4") else 16 if dtype == "G" else 0
            core = make.elementary(f"MPI_{name}", "?" if dtype == "?1" else dtype, char, kind, align)
            made[name] = predefined(Datatype._of(core), name)
    for name, value in _PAIR_VALUES.items():
        made[f"{name}_INT"] = predefined(Datatype._of(make.pair(f"MPI_{name}_INT", value, "i4")), f"{name}_INT")
    made["INT_INT"]._core.name = "MPI_2INT"
    for name in _ABSENT:
        made[name] = made["DATATYPE_NULL"]
    for alias, name in _ALIASES.items():
        made[alias] = made[name]
    return made


NAMED = _predefined()
"""All predefined datatypes by name."""

_OBJECTS = {each._core: each for name, each in NAMED.items() if each._core is not None and name not in _ALIASES}
DATATYPE_NULL, BYTE, INT, FLOAT, DOUBLE = (NAMED[name] for name in ("DATATYPE_NULL", "BYTE", "INT", "FLOAT", "DOUBLE"))
C_FLOAT_COMPLEX, C_DOUBLE_COMPLEX = NAMED["C_FLOAT_COMPLEX"], NAMED["C_DOUBLE_COMPLEX"]
_PAIRS = {NAMED[name]._core: NAMED[f"{name}_INT"]._core for name in _PAIR_VALUES}


def _table(entries: str) -> dict[str, Datatype]:
    table = {}
    for entry in entries.split():
        code, name = entry.split(":")
        table[code] = NAMED[name]
    return table


_typedict_c = _table("""
?:C_BOOL b:SIGNED_CHAR h:SHORT i:INT l:LONG q:LONG_LONG B:UNSIGNED_CHAR H:UNSIGNED_SHORT I:UNSIGNED L:UNSIGNED_LONG
Q:UNSIGNED_LONG_LONG f:FLOAT d:DOUBLE g:LONG_DOUBLE F:C_FLOAT_COMPLEX D:C_DOUBLE_COMPLEX G:C_LONG_DOUBLE_COMPLEX b1:C_BOOL
i1:INT8_T i2:INT16_T i4:INT32_T i8:INT64_T u1:UINT8_T u2:UINT16_T u4:UINT32_T u8:UINT64_T f2:FLOAT16_T f4:FLOAT f8:DOUBLE
f16:LONG_DOUBLE c8:C_FLOAT_COMPLEX c16:C_DOUBLE_COMPLEX c32:C_LONG_DOUBLE_COMPLEX""")
_typedict = _typedict_c | _table("""
e:FLOAT16_T Zf:C_FLOAT_COMPLEX Zd:C_DOUBLE_COMPLEX Zg:C_LONG_DOUBLE_COMPLEX n:COUNT N:UNSIGNED_LONG p:AINT P:UNSIGNED_LONG
c:CHAR a:CHAR S:CHAR S1:CHAR s:CHAR 1s:CHAR U:WCHAR U1:WCHAR u:UINT16_T 1u:UINT16_T w:WCHAR 1w:WCHAR M:INT64_T M8:INT64_T
m:INT64_T m8:INT64_T""")
_typedict_f = _table("""
l:LOGICAL i:INTEGER r:REAL s:REAL d:DOUBLE_PRECISION c:COMPLEX z:DOUBLE_COMPLEX l1:LOGICAL1 l2:LOGICAL2 l4:LOGICAL4 l8:LOGICAL8
i1:INTEGER1 i2:INTEGER2 i4:INTEGER4 i8:INTEGER8 r2:REAL2 r4:REAL4 r8:REAL8 r16:REAL16 c8:COMPLEX8 c16:COMPLEX16 c32:COMPLEX32""")


def lookup(code: str) -> Datatype:
    """The type of a type code.

    Raises:
        KeyError: there is none.
    """
    try:
        return _typedict[code]
    except KeyError:
        raise KeyError(f"cannot map {code!r} to MPI datatype") from None


def code_of(datatype: Datatype) -> str | None:
    """The type code, None if there is none (mpi4py's `_typecode`)."""
    return (make.type_code(datatype._core)[0] or None) if datatype._core is not None else None


def decode(datatype: Datatype, mark: bool = False) -> tuple[Datatype, str, dict[str, Any]]:
    """mpi4py's `_datatype_decode`."""
    return datatype.decode()


def create(datatype: Datatype, combiner: str, params: dict[str, Any], free: bool = False) -> Datatype:
    """mpi4py's `_datatype_create`, the reverse of `decode`."""
    return _recreate(datatype, combiner, params)


def alignment(datatype: Datatype) -> int | None:
    """Alignment of a predefined type in memory, None for others (mpi4py's `_typealign`)."""
    core = datatype._core
    if core is None or not (make.type_code(core)[0] or core.kind == "pair"):
        return None
    return int(core.align) or None


