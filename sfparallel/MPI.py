# ruff: noqa: F401, F403
"""MPI among the clones of a region, with the names of mpi4py's module `MPI`.

`COMM_WORLD` is what `sf.comm()` returns: the ranks of the region that a clone belongs to; outside a region, this process alone.
"""

from sfparallel.runtime.mpi.buffers import (
    BOTTOM,
    BUFFER_AUTOMATIC,
    IN_PLACE,
    BottomType,
    BufferAutomaticType,
    InPlaceType,
    buffer,
)
from sfparallel.runtime.mpi.comm import COMM_NULL, COMM_SELF, COMM_WORLD, Comm, Intracomm
from sfparallel.runtime.mpi.constants import *
from sfparallel.runtime.mpi.environment import (
    Aint_add,
    Aint_diff,
    Alloc_mem,
    Attach_buffer,
    Close_port,
    Compute_dims,
    Detach_buffer,
    Finalize,
    Flush_buffer,
    Free_mem,
    Get_abi_fortran_info,
    Get_abi_info,
    Get_abi_version,
    Get_address,
    Get_hw_resource_info,
    Get_library_version,
    Get_processor_name,
    Get_version,
    Iflush_buffer,
    Init,
    Init_thread,
    Is_finalized,
    Is_initialized,
    Is_thread_main,
    Lookup_name,
    Open_port,
    Pcontrol,
    Publish_name,
    Query_thread,
    Register_datarep,
    Unpublish_name,
    Wtick,
    Wtime,
    get_vendor,
)
from sfparallel.runtime.mpi.environment import address_of as _addressof
from sfparallel.runtime.mpi.environment import comm_lock as _comm_lock
from sfparallel.runtime.mpi.environment import comm_lock_table as _comm_lock_table
from sfparallel.runtime.mpi.environment import context_between as _commctx_inter
from sfparallel.runtime.mpi.environment import context_within as _commctx_intra
from sfparallel.runtime.mpi.environment import handle_of as _handleof
from sfparallel.runtime.mpi.environment import set_abort_status as _set_abort_status
from sfparallel.runtime.mpi.environment import size_of as _sizeof
from sfparallel.runtime.mpi.errhandler import ERRHANDLER_NULL, ERRORS_ABORT, ERRORS_ARE_FATAL, ERRORS_RETURN, Errhandler
from sfparallel.runtime.mpi.errors import CODES as _CODES
from sfparallel.runtime.mpi.errors import ERR_LASTCODE
from sfparallel.runtime.mpi.errors import MPIException as Exception
from sfparallel.runtime.mpi.errors import add_error_class as Add_error_class
from sfparallel.runtime.mpi.errors import add_error_code as Add_error_code
from sfparallel.runtime.mpi.errors import add_error_string as Add_error_string
from sfparallel.runtime.mpi.errors import get_error_class as Get_error_class
from sfparallel.runtime.mpi.errors import get_error_string as Get_error_string
from sfparallel.runtime.mpi.errors import remove_error_class as Remove_error_class
from sfparallel.runtime.mpi.errors import remove_error_code as Remove_error_code
from sfparallel.runtime.mpi.errors import remove_error_string as Remove_error_string
from sfparallel.runtime.mpi.group import GROUP_EMPTY, GROUP_NULL, Group
from sfparallel.runtime.mpi.info import INFO_ENV, INFO_NULL, Info
from sfparallel.runtime.mpi.intercomm import Intercomm
from sfparallel.runtime.mpi.op import OP_NULL, Op
from sfparallel.runtime.mpi.op import OPS as _OPS
from sfparallel.runtime.mpi.p2p import MESSAGE_NO_PROC, MESSAGE_NULL, Message
from sfparallel.runtime.mpi.pickling import Pickle, pickle
from sfparallel.runtime.mpi.request import REQUEST_NULL, Grequest, Prequest, Request
from sfparallel.runtime.mpi.session import SESSION_NULL, Session
from sfparallel.runtime.mpi.status import Status
from sfparallel.runtime.mpi.topology import UNWEIGHTED, WEIGHTS_EMPTY, Cartcomm, Distgraphcomm, Graphcomm, Topocomm
from sfparallel.runtime.mpi.types import NAMED as _NAMED
from sfparallel.runtime.mpi.types import Datatype, _typedict, _typedict_c, _typedict_f
from sfparallel.runtime.mpi.types import alignment as _typealign
from sfparallel.runtime.mpi.types import code_of as _typecode
from sfparallel.runtime.mpi.types import create as _datatype_create
from sfparallel.runtime.mpi.types import decode as _datatype_decode
from sfparallel.runtime.mpi.unsupported import FILE_NULL, WIN_NULL, File, Win

memory = buffer

globals().update(_CODES)
globals().update(_OPS)
globals().update(_NAMED)
