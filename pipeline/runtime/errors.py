"""The exception for errors that a user can correct, and words for those that the system or a library raises."""

import errno

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; make room and repeat the command, it continues where it stopped",
    errno.EDQUOT: "the disk quota is used up; make room and repeat the command, it continues where it stopped",
    errno.EFBIG: "the file size limit was reached (ulimit -f); raise it and repeat the command",
    errno.EACCES: "no permission; choose another folder or change its rights",
    errno.EPERM: "not permitted; choose another folder or change its rights",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder",
    errno.EISDIR: "a folder stands where a file is needed; choose another name",
    errno.ENOENT: "there is no such file or folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "symbolic links lead in a circle",
    errno.EMFILE: "too many files are open (ulimit -n); raise the limit, or use fewer --workers",
    errno.EIO: "the disk reports an error; check it, then repeat the command",
    errno.ESTALE: "the file system of a network mount does not answer; when it does, repeat the command to continue",
    errno.EINTR: "the file system interrupts its own calls; repeat the command, it continues where it stopped",
}
"""{errno of an OSError that the user can correct: what is wrong and what to do}; all others are bugs."""


class UserError(Exception):
    """An error that the user can correct. Its text says what is, what was asked, and what to do."""


def describe_disk_error(problem: OSError) -> str:
    """The file and what is wrong with it, if the user can correct it, else ""."""
    if problem.errno not in DISK_ERRORS:
        return ""
    return f"{problem.filename2 or problem.filename or 'writing'}: {DISK_ERRORS[problem.errno]}"


def describe_exhaustion(problem: Exception) -> str:
    """The error text if memory ran out or a loader process ended unexpectedly, else "".

    torch raises a plain RuntimeError for some of these, so they are recognised by their texts.
    """
    text = " ".join(str(problem).split())
    signs = ("killed by signal", "exited unexpectedly", "shared memory", "No space left on device")
    if "DataLoader worker" in text and any(sign in text for sign in signs):
        return (
            f"a loader process died ({text[:160]}); use fewer --workers (0: none), or give them more memory "
            "(docker run --shm-size), and repeat the command, it continues where it stopped"
        )
    is_memory_error = type(problem).__name__ in ("MemoryError", "_ArrayMemoryError", "OutOfMemoryError")
    if is_memory_error or "can't allocate memory" in text:
        return f"the memory is full ({text[:160]}); take a smaller batch where the command has one, or fewer students"
    return ""
