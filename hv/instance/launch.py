"""Making an instance run: a process that is made for it mounts its root, joins its networks, starts its program.

    whoever asks (P)                       the maker (M), a fork in a session of its own
      | --- fork ----------------------------->| root, networks, users, config.json
      |                                        | streams; Way.make: the program runs
      |                                        | keep.json, state.json; the keeper takes over the streams
      |<-- end, or what went wrong ------------|
                                               | Way.hold: holds it until it has ended

P may be a command or the keeper (a restart), and may be killed at any moment: M goes on. M killed: the container's
first process is killed with it until it runs, what is left is swept (finish.py). Driven by tests/root/test_instance.py
and tests/root/test_instance_faults.py.
"""

from __future__ import annotations

__all__ = ["Launch", "become_maker", "layers_of"]

import os
from _signal import SIGKILL
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket, socketpair
from fcntl import F_DUPFD_CLOEXEC, fcntl

from hv.container.state import now
from hv.errors import HvError, ImageError
from hv.instance.holder import END, prepare
from hv.instance.record import RUNNING, Instance
from hv.linux.signals import block_all
from hv.phases import mark
from hv.plainjson import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from hv.network.shape import Attachment

_REPORT_MOST = 1 << 16
_FD_MOST = 1 << 20
_ABOVE = 10                 # descriptors below are those of holder.py
NOT_FOUND, NOT_EXECUTABLE, FAILED = 127, 126, 125      # docker's, docker-run(1): exit status


class Launch:
    """The making of one instance that is locked. `layers`: where its image's are, if that is known already.

    `gate`: its output is read only once go() was called, by who is attached to it then. `again`: the keeper starts it
    again; who has asked it to stop meanwhile has asked for good. `files`: the limit of open files, not that of ours.
    `maker`: a process that waits to be the maker (ready.py), and a socket to it.
    """

    def __init__(self, instance: Instance, layers: list[str] | None = None, *, gate: bool = False,
                 again: bool = False, files: int = 0, maker: tuple[int, socket] | None = None) -> None:
        os.makedirs(instance.run, 0o700, exist_ok=True)
        if instance.has_begun:          # a start that was killed half way
            from hv.instance.finish import give_back

            give_back(instance)
        os.close(os.open(f"{instance.run}/began", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        if not again:
            instance.stopping(False)
        self._instance = instance
        if maker is not None:
            from hv.instance.ready import order

            self.pid, self._ours = maker
            try:
                order(self._ours, instance, layers, gate)
            except OSError:
                pass                    # it was killed: finish() says so
            return
        self._ours, theirs = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        self.pid = os.fork()
        if not self.pid:
            self._ours.close()
            _maker(instance, theirs, layers, gate, files)
        theirs.close()

    def fileno(self) -> int:
        """Readable once it is decided."""
        return self._ours.fileno()

    def go(self) -> None:
        """Whoever is to see all of its output is attached."""
        try:
            self._ours.send(b"g")
        except OSError:
            pass                        # it has failed: finish() says how

    def cancel(self) -> None:
        """Whoever wanted it has changed their mind: end it, however far it is."""
        self._ours.close()
        if self._instance.running:
            from hv.instance.way import way_of

            way_of(self._instance).kill(self._instance, SIGKILL)
            return
        os.kill(self.pid, SIGKILL)
        os.waitpid(self.pid, 0)
        from hv.instance.finish import abandon

        with self._instance:
            abandon(self._instance, "its start was interrupted", FAILED)

    def finish(self) -> None:
        """Wait until the program runs. HvError where it does not; `.exit_code` is 127, 126 or 125."""
        report = b""
        try:
            while data := self._ours.recv(_REPORT_MOST):
                report += data
        except OSError:
            pass
        finally:
            self._ours.close()
        if report == b"ok":
            return
        try:
            os.waitpid(self.pid, 0)     # so that nothing is left of it
        except ChildProcessError:
            pass
        try:
            said = loads(report.decode())
        except ValueError:
            said = {"error": "the process that was to start it has been killed"}
        error = HvError(str(said.get("error")), str(said.get("hint", "")))
        error.exit_code = int(said.get("code", FAILED))
        raise error


def layers_of(instance: Instance) -> list[str]:
    """The folders of its image's layers, unpacked again where that is needed."""
    from hv.image.layers import Layers
    from hv.image.store import Store

    store = Store()
    try:
        image = store.resolve(str(instance.image.get("id")))
    except ImageError:                  # removed by force: its layers may be there yet
        layers: list[str] = instance.about.get("layers") or []
        if layers and all(map(os.path.isdir, layers)):
            return layers
        raise
    return Layers(store).ensure(image)


def _maker(instance: Instance, report: socket, layers: list[str] | None, gate: bool, files: int) -> NoReturn:
    """The process that is made for it. Never returns."""
    try:
        block_all()
        os.setsid()
        os.chdir("/")
        report = _close_others(instance, report)
        if files:
            from resource import RLIMIT_NOFILE, getrlimit, setrlimit

            setrlimit(RLIMIT_NOFILE, (files, getrlimit(RLIMIT_NOFILE)[1]))
        _make(instance, report, layers or layers_of(instance), gate)
    except HvError as error:
        _fail(instance, report, f"{error}", error.hint, _code_of(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(instance, report, f"{where}{os.strerror(error.errno or 0)}", "", FAILED)
    except BaseException as error:
        _fail(instance, report, f"internal error: {type(error).__name__}: {error}", "", FAILED)
    os._exit(1)


def become_maker(instance: Instance, report: socket, layers: list[str] | None, gate: bool) -> NoReturn:
    """Make a locked instance, in a process that has been made for that."""
    _maker(instance, report, layers, gate, 0)


def _close_others(instance: Instance, report: socket) -> socket:
    """Nothing of our maker's stays open: a caller's pipes, the keeper's clients. The report, under another number."""
    lock = fcntl(instance.lock_fd, F_DUPFD_CLOEXEC, _ABOVE)
    told = fcntl(report.detach(), F_DUPFD_CLOEXEC, _ABOVE)
    instance.lock_fd = lock
    low = 3
    for fd in sorted((lock, told)):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, _FD_MOST)
    prepare(instance.run)
    return socket(fileno=told)


def _make(instance: Instance, report: socket, layers: list[str], gate: bool) -> NoReturn:
    from hv.instance.bundle import hostname_of, make_config
    from hv.instance.container_way import first_process
    from hv.instance.keeper_client import adopt
    from hv.instance.networking import join
    from hv.instance.rootfs import assemble, make_folder, mount_rows
    from hv.instance.streams import Streams
    from hv.instance.way import way_of

    settings = instance.settings
    way = way_of(instance)
    hostname = hostname_of(instance)
    home = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    rootfs, root = assemble(instance, layers)
    mark("rootfs")
    netns, attachment = join(instance, hostname)
    mark("network")
    config = make_config(instance, rootfs, root, files=_files(instance, hostname, attachment),
                         mounts=mount_rows(instance, root), netns=netns)
    make_folder(root, str(config["process"]["cwd"]))
    os.close(root)
    streams = Streams(terminal=settings.tty, interactive=settings.interactive, pty=way.pty)
    mark("config")
    pid = way.make(instance, config, streams)
    mark("made")
    fds = streams.put_outside()
    if gate:                            # before anybody can know of the streams, and read them
        report.recv(1)                  # or its end: whoever waited has been killed
    instance.save_kept([*fds, END], **first_process(pid), root=rootfs)
    instance.save_state(status=RUNNING, exit_code=None, started=now(), finished="", error="", oom=False)
    adopt(instance.id, home)
    os.close(home)
    try:
        report.send(b"ok")
    except OSError:
        pass
    report.close()
    instance.unlock()
    if settings.stdin_once:         # its end is to be heard of: nobody but the keeper may hold it
        os.dup2(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), 0)
    way.hold(instance)


def _files(instance: Instance, hostname: str, attachment: Attachment | None) -> list[tuple[str, str]]:
    """hosts, hostname and resolv.conf, written anew at each start."""
    texts = {"hostname": hostname + "\n"}
    if attachment is None:
        texts["hosts"] = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" \
                         f"127.0.1.1\t{hostname}\n"
        texts["resolv.conf"] = ""
    else:
        texts["hosts"], texts["resolv.conf"] = attachment.hosts, attachment.resolv_conf
    found = []
    for leaf, text in texts.items():
        path = f"{instance.folder}/{leaf}"
        if attachment is not None and not text and leaf != "hostname":
            found.append((f"/etc/{leaf}", f"/etc/{leaf}"))
            continue
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
        found.append((path, f"/etc/{leaf}"))
    return [(source, place) for source, place in found if os.path.exists(source)]


def _fail(instance: Instance, report: socket, text: str, hint: str, code: int) -> NoReturn:
    """Undo what outlives this process, say why, end."""
    from hv.instance.finish import abandon

    try:
        abandon(instance, text, code)
    except BaseException:
        pass                        # the next command's sweep
    try:
        report.send(dumps({"error": text, "hint": hint, "code": code}).encode())
    except OSError:
        pass
    os._exit(1)


def _code_of(error: HvError) -> int:
    """docker's exit code for a program that could not be started (docker-run(1)); others keep theirs."""
    return exec_code(error) or FAILED


def exec_code(error: HvError) -> int:
    """127: no such program; 126: it can't be run; 0: it was something else."""
    if error.exit_code in (NOT_FOUND, NOT_EXECUTABLE):
        return error.exit_code
    text = f"{error}"
    if not text.startswith('exec: "'):      # hv/container/identity.py and stub.py
        return 0
    missing = text.endswith(("file not found in $PATH", "no such file or directory", "not a directory"))
    return NOT_FOUND if missing else NOT_EXECUTABLE


__all__ += ["FAILED", "exec_code"]
