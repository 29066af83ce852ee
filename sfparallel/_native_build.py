"""Builds `sfparallel._native` (cffi, API mode) from `_native_calls.c`; used by `setup.py` only."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    int sf_unshare(int flags);
    int sf_setns(int fd, int type);
    int sf_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
    int sf_umount(const char *target, int flags);
    int sf_subreaper(int on);
    int sf_death_signal(int signal_number);

    struct sf_child {
        const char *program;
        char *const *argv;
        char *const *envp;
        const int *sources;
        const int *targets;
        int *spare;
        int n_fds;
        int death_signal;
        int failed_step;
    };
    enum { SF_STEP_NONE, SF_STEP_SIGNALS, SF_STEP_PDEATHSIG, SF_STEP_PARENT, SF_STEP_SETSID, SF_STEP_DUP, SF_STEP_EXEC,
           SF_STEP_VFORK };
    int sf_spawn(struct sf_child *child);
    """
)
# The text goes in whole, so that the generated C file is all that a compiler has to be given, wherever setuptools puts it.
ffibuilder.set_source(
    "sfparallel._native",
    (Path(__file__).parent / "_native_calls.c").read_text(),
    extra_compile_args=["-O2", "-g0", "-Wall", "-Wextra", "-Wno-missing-field-initializers"],
)
