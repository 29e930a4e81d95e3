"""The kinds of mistake a user can make, each with its own name, and the machine's faults.

Every message says what was expected, what came, where, and what to do. Our own bugs are `assert`s, not these.
"""

import errno

# Full or failing disks: no space, over quota, over the largest file, input/output error, read-only.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


class InfctxError(Exception):
    """Something the user can put right. The command line prints the message without a traceback and exits with 2.

    is_shared: every process of the run raises it. is_told: another process prints it.
    """

    is_shared = False
    is_told = False


class RecipeError(InfctxError):
    """A recipe key or value that cannot be honoured."""


class DataError(InfctxError):
    """A file or row that cannot be turned into documents."""


class CheckpointError(InfctxError):
    """A model file, run folder or export that cannot be read or written."""


class InfctxWarning(UserWarning):
    """Something a person should know of, though it ends nothing. The command line prints it as one line, once."""


class MachineError(Exception):
    """The machine could not do what was asked: a full disk, no memory. The command line exits with 4.

    is_shared: every process of the run raises it. is_told: another process prints it.
    """

    is_shared = False
    is_told = False


def machine_fault(error: BaseException) -> str | None:
    """Say what failed in the machine, or None if this error is not the machine's."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = f" ({error.filename})" if error.filename else ""
        return f"The disk failed: {error.strerror or error}{where}."
    return memory_fault(error)


def memory_fault(error: BaseException) -> str | None:
    """Say that there was too little memory, of the host or of a device, or None if this error is another."""
    is_out_of_memory = (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )
    if is_out_of_memory:
        return f"Out of memory: {str(error).splitlines()[0] if str(error) else 'the machine has no more'}"
    return None
