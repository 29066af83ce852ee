"""Memory as MPI sees it: bytes with an address. Objects export it as buffers, by DLPack, or by the CUDA array interface."""

from __future__ import annotations

import ctypes
import operator
import warnings
from typing import Any, Self, SupportsIndex

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


_constants: dict[type, Any] = {}


class _Constant(int):
    """A marker that is used in place of a buffer."""

    _name: str
    _value: int

    def __new__(cls) -> Self:
        # One object per class, so that it can be recognized by identity.
        if cls not in _constants:
            _constants[cls] = super().__new__(cls, cls._value)
        only: Self = _constants[cls]
        return only

    def __repr__(self) -> str:
        return self._name

    def __bool__(self) -> bool:
        return self._value != 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class BottomType(_Constant):
    """Address zero: displacements are addresses."""

    _name, _value = "BOTTOM", 0


class InPlaceType(_Constant):
    """The receive buffer holds the contribution."""

    _name, _value = "IN_PLACE", -1


class BufferAutomaticType(_Constant):
    """Buffered sends need no buffer of the user's."""

    _name, _value = "BUFFER_AUTOMATIC", -2


BOTTOM = BottomType()
IN_PLACE = InPlaceType()
BUFFER_AUTOMATIC = BufferAutomaticType()


def is_in_place(obj: Any) -> bool:
    """Whether an argument stands for IN_PLACE; as in mpi4py, None does, too."""
    return obj is IN_PLACE or obj is None


def at_address(address: int, nbytes: int, owner: Any = None) -> Bytes:
    """The bytes at an address; `owner` lives as long as the array."""
    if nbytes == 0:
        return np.empty(0, np.uint8)
    # Any: it gets an attribute, and numpy's stubs before 2.5 do not take it for a buffer.
    memory: Any = (ctypes.c_uint8 * nbytes).from_address(address)
    memory.owner = owner
    array: Bytes = np.frombuffer(memory, np.uint8)
    return array


class buffer(np.ndarray[Any, np.dtype[np.uint8]]):
    """A block of memory, readable or writable (mpi4py's `MPI.buffer`).

    An array, because Python 3.11 lets only types that are written in C export memory.

    Args:
        buf: any object that exports a buffer; without it the block is empty.
    """

    _released: bool
    obj: Any

    def __new__(cls, *buf: Any) -> buffer:
        if not buf:
            return cls._of(np.empty(0, np.uint8), None)
        (obj,) = buf
        return cls._of(byte_array(obj, readonly=True), obj)

    @classmethod
    def _of(cls, data: Bytes, obj: Any, *, readonly: bool = False) -> buffer:
        new = data.view(buffer)
        new.obj = obj
        if readonly:
            new.flags.writeable = False
        return new

    def __array_finalize__(self, obj: Any) -> None:
        self._released = False
        self.obj = getattr(obj, "obj", None)

    @staticmethod
    def allocate(nbytes: int, clear: bool = False) -> buffer:
        """Allocate memory."""
        if nbytes < 0:
            raise ValueError("expecting non-negative size")
        data: Bytes = np.zeros(nbytes, np.uint8) if clear else np.empty(nbytes, np.uint8)
        return buffer._of(data, data)

    @staticmethod
    def frombuffer(obj: Any, readonly: bool = False) -> buffer:
        """The memory of an object."""
        return buffer._of(byte_array(obj, readonly=readonly), obj, readonly=readonly)

    @staticmethod
    def fromaddress(address: int, nbytes: int, readonly: bool = False) -> buffer:
        """Memory at an address."""
        if nbytes < 0:
            raise ValueError("expecting non-negative buffer length")
        if nbytes > 0 and not address:
            raise ValueError("expecting non-NULL address")
        return buffer._of(at_address(address, nbytes), None, readonly=readonly)

    @property
    def address(self) -> int:
        return 0 if self._released or (self.obj is None and not self.size) else int(self.ctypes.data)

    @property
    def nbytes(self) -> int:
        return 0 if self._released else int(self.size)

    @property
    def readonly(self) -> bool:
        return not self._released and not self.flags.writeable

    @property
    def format(self) -> str:
        return "B"

    def __len__(self) -> int:
        return self.nbytes

    def __bool__(self) -> bool:
        return self.nbytes != 0

    def __eq__(self, other: object) -> bool:
        try:
            return self.tobytes() == bytes(memoryview(other).cast("B"))  # type: ignore[arg-type]
        except TypeError:
            return False

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, slice):
            return super().__getitem__(self._slice(item))
        return int(super().__getitem__(self._index(item)))

    def __setitem__(self, item: Any, value: Any) -> None:
        if not self.flags.writeable:
            raise TypeError("memory buffer is read-only")
        if isinstance(item, slice):
            where = self._slice(item)
            if not isinstance(value, int):
                value = byte_array(value, readonly=True)
                if len(value) != len(range(*where.indices(self.nbytes))):
                    raise ValueError("slice length does not match buffer")
            super().__setitem__(where, value)
        else:
            super().__setitem__(self._index(item), value)

    def __delitem__(self, item: Any) -> None:
        raise NotImplementedError("memory buffers cannot shrink")

    def tobytes(self, order: Any = None) -> bytes:
        """A copy; the order does not matter."""
        return bytes(self.data[:self.nbytes])

    def _slice(self, item: slice) -> slice:
        start, stop, step = item.indices(self.nbytes)
        if step != 1:
            raise IndexError("slice with step not supported")
        return slice(start, max(start, stop))

    def _index(self, item: SupportsIndex) -> int:
        try:
            index = item.__index__()
        except AttributeError:
            raise TypeError("index must be integer or slice") from None
        if index < 0:
            index += self.nbytes
        if not 0 <= index < self.nbytes:
            raise IndexError("index out of range")
        return index

    def cast(self, format: str, shape: list[int] | tuple[int, ...] = ()) -> memoryview:
        """A view with another format and shape."""
        view: Any = self.data
        return view.cast(format, shape) if shape else view.cast(format)  # type: ignore[no-any-return]

    def toreadonly(self) -> buffer:
        """The same memory, not writable."""
        return buffer._of(self.view(np.ndarray), self.obj, readonly=True)

    def release(self) -> None:
        """Let go of the memory."""
        self._released = True
        self.obj = None


class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DLTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("device", _DLDevice), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
                ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64))


class _DLManagedVersioned(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("manager", ctypes.c_void_p),
                ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _DLTensor))


_CAPSULE = ctypes.pythonapi.PyCapsule_GetPointer
_CAPSULE.restype = ctypes.c_void_p
_CAPSULE.argtypes = [ctypes.py_object, ctypes.c_char_p]

# Kind and bits of an item; complex numbers may also come as two lanes of floats, since the bits of the longest do not fit.
_DLPACK_FORMATS = {
    (0, 8, 1): "b", (0, 16, 1): "h", (0, 32, 1): "i", (0, 64, 1): "l", (1, 8, 1): "B", (1, 16, 1): "H", (1, 32, 1): "I",
    (1, 64, 1): "L", (2, 16, 1): "e", (2, 32, 1): "f", (2, 64, 1): "d", (2, 128, 1): "g", (2, 32, 2): "F", (2, 64, 2): "D",
    (2, 128, 2): "G", (5, 64, 1): "F", (5, 128, 1): "D", (6, 8, 1): "?",
}
_DLPACK_HOST = 1
_DLPACK_READ_ONLY = 1
_CUDA_FORMATS = {
    "b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "l", "u1": "B", "u2": "H", "u4": "I", "u8": "L", "f2": "e", "f4": "f",
    "f8": "d", "f16": "g", "c8": "F", "c16": "D", "c32": "G",
}


class _Exported:
    """Memory found through DLPack or the CUDA array interface.

    Attributes:
        bytes: the memory.
        format: of its items.
    """

    def __init__(self, data: Bytes, format: str) -> None:
        self.bytes = data
        self.format = format


def _contiguous(shape: list[int], strides: list[float]) -> bool:
    """Whether memory has no holes, in one order or the other; strides in items."""
    def matches(dims: list[tuple[int, float]]) -> bool:
        size = 1
        for length, stride in dims:
            if length > 1 and stride != size:
                return False
            size *= length
        return True

    pairs = list(zip(shape, strides, strict=True))
    return matches(pairs) or matches(pairs[::-1])


def _dlpack_tensor(obj: Any) -> tuple[Any, _DLTensor, bool]:
    """The capsule, what is in it, and whether it is read-only."""
    device, number = obj.__dlpack_device__()
    operator.index(number)
    # What is not the host's memory is handed over in step with the device's default stream.
    stream = {} if operator.index(device) == _DLPACK_HOST else {"stream": -1}
    try:
        capsule = obj.__dlpack__(**stream, max_version=(1, 0), copy=False)
        name = b"dltensor_versioned"
    except TypeError:  # before version 1.0
        capsule = obj.__dlpack__(**stream)
        name = b"dltensor"
    try:
        pointer = _CAPSULE(capsule, name)
    except ValueError as error:
        raise BufferError("dlpack: invalid capsule object") from error
    if name == b"dltensor":
        return capsule, _DLTensor.from_address(pointer), False
    managed = _DLManagedVersioned.from_address(pointer)
    if managed.major != 1:
        raise BufferError(f"dlpack: version {managed.major} is not supported")
    return capsule, managed.tensor, bool(managed.flags & _DLPACK_READ_ONLY)


def _from_dlpack(obj: Any) -> _Exported:
    capsule, tensor, readonly = _dlpack_tensor(obj)
    if tensor.ndim < 0:
        raise BufferError("dlpack: number of dimensions is negative")
    if tensor.ndim > 0 and not tensor.shape:
        raise BufferError("dlpack: shape is NULL")
    shape = [tensor.shape[i] for i in range(tensor.ndim)]
    strides = [tensor.strides[i] for i in range(tensor.ndim)] if tensor.strides else None
    if any(length < 0 for length in (*shape, *(strides or ()))):
        raise BufferError("dlpack: shape or strides item is negative")
    if strides is not None and not _contiguous(shape, strides):
        raise BufferError("dlpack: buffer is not contiguous")
    nbytes = (tensor.bits * tensor.lanes + 7) // 8
    for length in shape:
        nbytes *= length
    data = at_address((tensor.data or 0) + tensor.byte_offset, nbytes, capsule)
    if readonly and len(data):
        data.flags.writeable = False
    return _Exported(data, _DLPACK_FORMATS.get((tensor.code, tensor.bits, tensor.lanes), ""))


def _from_cuda_interface(obj: Any) -> _Exported:
    interface = obj.__cuda_array_interface__
    address, readonly = interface["data"]
    shape, typestr, strides = interface["shape"], interface["typestr"], interface.get("strides")
    if typestr[0] == ">":
        raise BufferError(f"__cuda_array_interface__: typestr {typestr!r} with non-native byte order")
    if typestr[0] not in "<|":
        raise BufferError(f"__cuda_array_interface__: typestr {typestr!r} with unrecognized byte order")
    if interface.get("mask") is not None:
        raise BufferError("__cuda_array_interface__: cannot handle masked arrays")
    itemsize = int(typestr[2:])
    count = 1
    for length in shape:
        count *= length
    if count < 0:
        raise BufferError(f"__cuda_array_interface__: buffer with negative size (shape:{shape}, size:{count})")
    if strides is not None and not _contiguous(list(shape), [stride / itemsize for stride in strides]):
        raise BufferError(f"__cuda_array_interface__: buffer is not contiguous (shape:{shape}, strides:{strides})")
    descr = interface.get("descr")
    if descr is not None and (len(descr) != 1 or descr[0] != ("", typestr)):
        warnings.warn("__cuda_array_interface__: ignoring 'descr' key", RuntimeWarning, stacklevel=2)
    data = at_address(address or 0, count * itemsize, obj)
    if readonly and len(data):
        data.flags.writeable = False
    return _Exported(data, _CUDA_FORMATS.get(typestr[1:], ""))


def exports(obj: Any) -> bool:
    """Whether an object is memory for MPI, though it does not export a buffer."""
    return hasattr(obj, "__dlpack__") or hasattr(obj, "__cuda_array_interface__")


def exported(obj: Any) -> _Exported | None:
    """Memory of an object that does not export a buffer."""
    if hasattr(obj, "__dlpack__"):
        if not hasattr(obj, "__dlpack_device__"):
            raise NotImplementedError("dlpack: missing support")
        return _from_dlpack(obj)
    if hasattr(obj, "__cuda_array_interface__"):
        return _from_cuda_interface(obj)
    return None


def is_buffer(obj: Any) -> bool:
    """Whether an object is memory for MPI."""
    if isinstance(obj, np.ndarray | bytes | bytearray | memoryview | buffer):
        return True
    try:
        memoryview(obj)
    except TypeError:
        return False
    except (BufferError, ValueError):
        return True
    return True


def byte_array(obj: Any, *, readonly: bool) -> Bytes:
    """The bytes of an object as an array, without a copy.

    Args:
        readonly: whether memory that cannot be written is good enough.

    Raises:
        BufferError: the memory is not contiguous, or not writable.
        TypeError: it exports no memory.
    """
    if isinstance(obj, buffer):
        data = obj.view(np.ndarray)[:obj.nbytes]
    elif not is_buffer(obj):
        other = exported(obj)
        if other is None:
            raise TypeError(f"a bytes-like object is required, not {type(obj).__name__}")
        data = other.bytes
    else:
        data = _bytes_of(obj)
    if not readonly and not data.flags.writeable and len(data):
        raise BufferError("object is not writable")
    return data


def _bytes_of(obj: Any) -> Bytes:
    view = memoryview(obj)
    if view.nbytes == 0:
        return np.empty(0, np.uint8)
    if view.c_contiguous:
        return np.frombuffer(obj, np.uint8)
    if view.f_contiguous:
        return np.frombuffer(np.asarray(obj).T, np.uint8)
    raise BufferError("ndarray is not contiguous")


def item_format(obj: Any) -> str:
    """The format of an object's items, in the native byte order (see the struct module and numpy's type codes); empty where it is
    not known.

    Raises:
        BufferError: it is in another byte order.
    """
    if isinstance(obj, np.ndarray):
        if not obj.dtype.isnative:
            raise BufferError(f"format string {obj.dtype.str!r} with non-native byte order")
        return obj.dtype.char if obj.dtype.char not in "OVSUMm" else obj.data.format
    if isinstance(obj, buffer):
        return "B"
    if not is_buffer(obj):
        other = exported(obj)
        return "" if other is None else other.format
    format = memoryview(obj).format
    if format[0] == ">":
        raise BufferError(f"format string {format!r} with non-native byte order")
    return format[1:] if format[0] in "@<" else format
