"""The process that `sandbox.py` starts: shuts itself in, runs the program, says how it ended.

Runs as `python -I -S sandbox_worker.py DESCRIPTOR`, with the request as JSON on its standard input. Imports the
standard library alone. The verdict is one line on the descriptor: the request's word, a blank, and what happened.
"""

import ctypes
import json
import os
import resource
import signal
import sys


# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 0x1
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
LINUX_CAPABILITY_VERSION_3 = 0x20080522


class Libc:
    """Calls of the C library that raise OSError, naming the call."""

    def __init__(self):
        self.library = ctypes.CDLL(None, use_errno=True)

    def __getattr__(self, name):
        function = getattr(self.library, name)

        def call(*arguments):
            converted = [a.encode() if isinstance(a, str) else a for a in arguments]
            if function(*converted) < 0:
                raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

        return call


def enter_namespaces(libc):
    """Namespaces of its own for everything that can be reached by a name or a number."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        libc.unshare(flags)
        return
    libc.unshare(flags | CLONE_NEWUSER)
    for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def change_root(libc, readable, disk_bytes):
    """A file system in memory with Python's library, read-only, and /tmp; nothing else of the machine's."""
    root = os.getcwd()
    libc.mount("none", "/", None, MS_REC | MS_PRIVATE, None)
    libc.mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},nr_inodes=4096,mode=755")
    for path in readable:
        target = root + path
        if os.path.islink(path):  # /lib of most systems
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(path), target)
            continue
        os.makedirs(target, exist_ok=True)
        libc.mount(path, target, None, MS_BIND | MS_REC, None)
        read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
        size = ctypes.c_size_t(ctypes.sizeof(read_only))
        number, here = ctypes.c_long(SYS_MOUNT_SETATTR), ctypes.c_long(AT_FDCWD)
        libc.syscall(number, here, ctypes.c_char_p(target.encode()), ctypes.c_long(AT_RECURSIVE), read_only, size)
    os.mkdir(f"{root}/dev")
    for name in ("null", "urandom"):
        open(f"{root}/dev/{name}", "w").close()
        libc.mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND, None)
    os.makedirs(f"{root}/tmp", exist_ok=True)  # there where Python itself lies below /tmp
    os.chmod(f"{root}/tmp", 0o1777)
    os.chdir(root)
    libc.pivot_root(".", ".")  # the old root comes to lie over the new one, from where it is taken off
    libc.umount2(".", MNT_DETACH)
    os.chdir("/tmp")


def drop_privileges(libc, nobody):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
    else:  # all capabilities of its own user namespace
        header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
        libc.capset(header, (ctypes.c_uint32 * 6)())
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_limits(limits):
    lower = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # threads count too
    }
    for name, value in lower.items():
        try:
            resource.setrlimit(name, (value, value))
        except (ValueError, OSError):
            if name != resource.RLIMIT_AS:  # macOS has none
                raise


BLOCKED_EVENTS = (
    *("socket.", "subprocess.", "ctypes.", "os.system", "os.fork", "os.exec", "os.spawn", "os.posix_spawn"),
    *("os.kill", "signal.pthread_kill", "resource.setrlimit", "resource.prlimit", "urllib.", "mmap.", "sqlite3."),
)
BLOCKED_IMPORTS = frozenset({"ctypes", "_ctypes", "_posixsubprocess", "socket", "_socket", "multiprocessing"})
# Events about files, and which of their arguments are paths that are changed
CHANGING = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime"), (0,)),
    **dict.fromkeys(("os.link", "os.symlink", "os.rename"), (0, 1)),
}


def add_audit_hook():
    """See `AUDIT_HOOK` of sandbox.py."""
    folder = os.path.realpath(os.getcwd()) + os.sep
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    # Bound here: the program can replace what it finds in modules
    realpath, isdir, fsdecode, refusal = os.path.realpath, os.path.isdir, os.fsdecode, PermissionError
    events, imports, changing = BLOCKED_EVENTS, BLOCKED_IMPORTS, CHANGING

    def inside(path):
        return isinstance(path, int) or (realpath(fsdecode(path)) + os.sep).startswith(folder)

    def hook(event, arguments):
        if event.startswith(events) or (event == "import" and arguments[0].partition(".")[0] in imports):
            raise refusal(f"{event} is not allowed here")
        if event == "open" and not inside(arguments[0]):
            # The event does not tell to which open folder a path is relative, so no other is to be had
            if arguments[2] & writing or isdir(arguments[0]):
                raise refusal("writing is allowed in the current folder only")
        if event in changing and not all(inside(arguments[place]) for place in changing[event]):
            raise refusal(f"{event} is allowed in the current folder only")

    sys.addaudithook(hook)


def run(program, say):
    """Run the program in this process; `say` must have all it needs, since afterwards nothing can be relied on."""
    leave, base, name_of = os._exit, BaseException, type
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "program"})
        outcome = "passed"
    except base as error:
        outcome = f"raised {name_of(error).__name__}"
    say(outcome)
    leave(0)


def supervise(child, limits, say):
    """Wait for the child, the first process of its namespace, with which all of them end."""
    arrived = signal.sigtimedwait([signal.SIGCHLD], limits["wall_seconds"])
    if arrived is None:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    spent = usage.ru_utime + usage.ru_stime
    if arrived is None or (os.WIFSIGNALED(status) and spent >= limits["cpu_seconds"]):
        say("timed out")


def main():
    descriptor = int(sys.argv[1])
    request = json.loads(sys.stdin.buffer.read())
    os.environ.clear()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    write, word, encode = os.write, request["word"], str.encode

    def say(outcome):
        write(descriptor, encode(f"{word} {outcome}\n"))

    limits = request["limits"]
    try:
        if request["isolation"] != "namespaces":
            set_limits(limits)
            signal.alarm(int(limits["wall_seconds"]) + 1)
            add_audit_hook()
        else:
            if not sys.platform.startswith("linux"):
                raise OSError(f"{sys.platform} has no namespaces")
            libc = Libc()
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
            enter_namespaces(libc)
            child = os.fork()
            if child:
                supervise(child, limits, say)
                os._exit(0)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            change_root(libc, request["readable"], limits["disk_bytes"])
            drop_privileges(libc, request["nobody"])
            set_limits(limits)
    except (OSError, AttributeError, ValueError) as error:
        say(f"setup: {getattr(error, 'strerror', None) or error}")
        os._exit(1)
    program = request.pop("program")
    request.clear()
    run(program, say)


main()
