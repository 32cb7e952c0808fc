"""The system calls that no candidate needs, as a filter for the kernel.

A list of what is refused, not of what is allowed: Python and numpy use too many calls, and other ones with each
version. What is refused fails with EPERM (EACCES for the wrong kind of socket): a program can say what it missed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket

_REFUSED = (
    # into other processes
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd", "pidfd_open",
    # file systems and namespaces
    "mount", "umount", "umount2", "pivot_root", "chroot", "unshare", "setns", "open_tree", "move_mount", "fsopen",
    "fsconfig", "fsmount", "fspick", "mount_setattr", "open_by_handle_at", "name_to_handle_at", "fanotify_init",
    # the kernel's most exposed parts
    "add_key", "request_key", "keyctl", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter",
    "io_uring_register", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot",
    "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "settimeofday", "clock_settime", "clock_adjtime",
    "adjtimex", "sethostname", "setdomainname", "syslog", "iopl", "ioperm", "modify_ldt", "personality", "vhangup",
    "uselib", "nfsservctl", "lookup_dcookie", "migrate_pages", "move_pages", "mbind", "set_mempolicy",
    # memory that no limit counts
    "memfd_create", "memfd_secret", "shmget", "shmat", "semget", "msgget", "mq_open",
)  # fmt: skip
_GROUPS = ("setsid", "setpgid")
_NEW_NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_SOCKETS = (socket.AF_UNIX, socket.AF_INET, getattr(socket, "AF_INET6", 10))


class NoSeccomp(Exception):
    """This machine cannot make filters; the message says what is missing."""


@functools.cache
def seccomp_filter(*, keep_group: bool = False) -> bytes:
    """The filter as the kernel takes it.

    Args:
        keep_group: processes cannot leave their process group, so that killing the group kills them all.

    Raises:
        NoSeccomp: libseccomp is missing, or does not know this machine.
    """
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, OSError) as error:
        raise NoSeccomp(f"libseccomp is missing (Debian: apt install libseccomp2): {error}") from error
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in (*_REFUSED, *(_GROUPS if keep_group else ())):
        with contextlib.suppress(OSError, ValueError):  # a call that this machine does not have
            rules.add_rule(seccomp.ERRNO(errno.EPERM), name)
    for flag in _NEW_NAMESPACES:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags lie in memory: glibc then uses clone
    for family in range(max(_SOCKETS) + 1):
        if family not in _SOCKETS:
            rules.add_rule(seccomp.ERRNO(errno.EACCES), "socket", seccomp.Arg(0, seccomp.EQ, family))
    rules.add_rule(seccomp.ERRNO(errno.EACCES), "socket", seccomp.Arg(0, seccomp.GT, max(_SOCKETS)))
    read, write = os.pipe()
    with open(read, "rb") as reader, open(write, "wb") as writer:
        rules.export_bpf(writer)
        writer.close()
        return reader.read()
