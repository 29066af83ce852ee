"""Communicators that send large buffers beside the pickle: all of ours do, so these are the very same classes."""

from sfparallel.runtime.mpi.comm import Comm, Intracomm
from sfparallel.runtime.mpi.intercomm import Intercomm
from sfparallel.runtime.mpi.p2p import Message
from sfparallel.runtime.mpi.pickling import Pickle, pickle
from sfparallel.runtime.mpi.request import Request

__all__ = ["Comm", "Intercomm", "Intracomm", "Message", "Pickle", "Request", "pickle"]
