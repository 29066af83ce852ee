"""`mpi4py.util.dtlib`: datatypes of numpy from those of MPI, and the reverse."""

from __future__ import annotations

from typing import Any

import numpy as np

from sfparallel.runtime.mpi import constants as c
from sfparallel.runtime.mpi.types import Datatype, alignment, code_of

_INDEXED = (c.COMBINER_INDEXED, c.COMBINER_HINDEXED, c.COMBINER_INDEXED_BLOCK, c.COMBINER_HINDEXED_BLOCK)
_F90 = (c.COMBINER_F90_INTEGER, c.COMBINER_F90_REAL, c.COMBINER_F90_COMPLEX)


def from_numpy_dtype(dtype: Any) -> Datatype:
    """The MPI datatype of a numpy dtype: of a structure with its fields, of a subarray with its shape.

    Raises:
        ValueError: it holds Python objects, or is in another byte order than the machine's.
    """
    given = np.dtype(dtype)
    if given.hasobject:
        raise ValueError("NumPy datatype with object entries")
    if not given.isnative:
        raise ValueError("NumPy datatype with non-native byteorder")
    if given.fields:
        fields = [given.fields[name] for name in given.names or ()]
        made = Datatype.Create_struct([1] * len(fields), [field[1] for field in fields],
                                      [from_numpy_dtype(field[0]) for field in fields])
        return made.Create_resized(0, given.itemsize)
    if given.subdtype:
        base, shape = given.subdtype
        element = from_numpy_dtype(base)
        if len(shape) == 1:
            return element.Create_contiguous(shape[0])
        return element.Create_subarray(shape, shape, [0] * len(shape))
    return Datatype.fromcode(given.char).Dup()


def to_numpy_dtype(datatype: Datatype) -> np.dtype[Any]:
    """The numpy dtype of an MPI datatype; gaps are those of a structure with fields f0, f1, ...

    Raises:
        ValueError: there is none.
    """
    if datatype._core is None:
        raise ValueError("cannot convert null MPI datatype to NumPy")
    combiner = datatype.combiner
    if combiner in (c.COMBINER_NAMED, *_F90):
        code = code_of(datatype)
        if code is not None:
            return np.dtype(code)
        packed = datatype._core.dtype  # a pair, for MINLOC and MAXLOC
        return np.dtype(f"{packed['value'].char},{packed['index'].char}", align=True)
    base, _, info = datatype.decode()
    if combiner == c.COMBINER_RESIZED and base.combiner == c.COMBINER_STRUCT:
        return _struct(base.decode()[2], datatype.extent, aligned=_is_aligned(base, info["extent"]))
    if combiner == c.COMBINER_STRUCT:
        return _struct(info, datatype.extent, aligned=True)
    if combiner == c.COMBINER_VALUE_INDEX:
        return np.dtype([("f0", to_numpy_dtype(info["value"])), ("f1", to_numpy_dtype(info["index"]))], align=True)
    if combiner == c.COMBINER_DUP:
        return to_numpy_dtype(base)
    if combiner == c.COMBINER_CONTIGUOUS:
        return np.dtype((to_numpy_dtype(base), (info["count"],)))
    if combiner == c.COMBINER_SUBARRAY and list(info["sizes"]) == list(info["subsizes"]) and not any(info["starts"]):
        sizes = info["sizes"][::-1] if info["order"] == c.ORDER_FORTRAN else info["sizes"]
        return np.dtype((to_numpy_dtype(base), tuple(sizes)))
    if combiner in (c.COMBINER_VECTOR, c.COMBINER_HVECTOR, *_INDEXED):
        return _spread(datatype, base, combiner, info)
    raise ValueError("cannot convert MPI datatype to NumPy")


def _struct(info: dict[str, Any], itemsize: int, *, aligned: bool) -> np.dtype[Any]:
    kinds, lengths, places = info["datatypes"], info["blocklengths"], info["displacements"]
    formats = [to_numpy_dtype(kind) if length == 1 else (to_numpy_dtype(kind), length)
               for kind, length in zip(kinds, lengths, strict=True)]
    aligned = aligned and all(map(_is_aligned, kinds, places))
    return _fields(formats, places, aligned=aligned, itemsize=itemsize)


def _spread(datatype: Datatype, base: Datatype, combiner: int, info: dict[str, Any]) -> np.dtype[Any]:
    """Blocks of one type."""
    element, in_bytes = to_numpy_dtype(base), combiner in (c.COMBINER_HVECTOR, c.COMBINER_HINDEXED, c.COMBINER_HINDEXED_BLOCK)
    unit = 1 if in_bytes else base.extent
    if combiner in _INDEXED:
        places = [place * unit for place in info["displacements"]]
        lengths = info["blocklengths"] if "blocklengths" in info else [info["blocklength"]] * len(places)
        aligned = all(_is_aligned(base, place) for place in places) if in_bytes else _is_aligned(base)
        return _fields([(element, (length,)) for length in lengths], places, aligned=aligned)
    stride = info["stride"] * unit if info["count"] > 1 or not in_bytes else 0
    formats = [(element, (info["blocklength"],))] * info["count"]
    aligned = _is_aligned(base, stride) if in_bytes else _is_aligned(base)
    return _fields(formats, [i * stride for i in range(info["count"])], aligned=aligned, itemsize=datatype.extent)


def _fields(formats: list[Any], places: list[int], *, aligned: bool, **more: Any) -> np.dtype[Any]:
    names = [f"f{i}" for i in range(len(formats))]
    spec: Any = {"names": names, "formats": formats, "offsets": places, "aligned": aligned, **more}
    made: np.dtype[Any] = np.dtype(spec)
    return made


def _is_aligned(datatype: Datatype, offset: int = 0) -> bool:
    """Whether all elementary items lie at multiples of their alignment."""
    if datatype.is_predefined:
        return not offset or not offset % (alignment(datatype) or 1)
    base, _, info = datatype.decode()
    combiner = datatype.combiner
    kinds, places = [base], [0]
    if combiner == c.COMBINER_STRUCT:
        kinds, places = info["datatypes"], info["displacements"]
    elif combiner == c.COMBINER_RESIZED:
        places = [info["extent"]]
    elif combiner == c.COMBINER_HVECTOR:
        places = [info["stride"] if info["count"] > 1 else 0]
    elif combiner in (c.COMBINER_HINDEXED, c.COMBINER_HINDEXED_BLOCK):
        kinds, places = [base] * len(info["displacements"]), info["displacements"]
    return all(_is_aligned(kind, offset + place) for kind, place in zip(kinds, places, strict=True))
