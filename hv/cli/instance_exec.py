"""`pyhv exec`: one more program in a running instance. Exit code: its own; 126, 127 as `run` has them, 125 ours.

Driven by tests/root/test_instance_exec.py.
"""

from __future__ import annotations

__all__ = ["EXEC_OPTIONS", "command_exec"]

from hv.cli.words import Opt, parse_words
from hv.errors import ConfigError, HvError, StateError
from hv.instance.records import find

TYPE_CHECKING = False

EXEC_OPTIONS = (
    Opt("interactive", "", "give it our standard input", "i"),
    Opt("tty", "", "give it a terminal", "t"),
    Opt("detach", "", "do not wait for its end", "d"),
    Opt("env", "NAME[=VALUE]", "one more variable", "e", many=True),
    Opt("env-file", "FILE", "variables, one a line", many=True),
    Opt("workdir", "DIR", "its directory", "w"),
    Opt("user", "NAME|UID[:GROUP]", "who it is", "u"),
    Opt("privileged", "", "of a container: all capabilities"),
    Opt("detach-keys", "KEYS", "taken for docker's sake; a program of exec ends with us"),
)


def command_exec(arguments: list[str]) -> int:
    """exec [options] INSTANCE COMMAND ..."""
    try:
        return _exec(arguments)
    except HvError as error:
        from hv.instance.launch import FAILED, exec_code

        error.exit_code = exec_code(error) or (1 if isinstance(error, StateError) else FAILED)
        raise


def _exec(arguments: list[str]) -> int:
    import os

    from hv.instance.bundle import exec_process
    from hv.instance.settings import Settings
    from hv.instance.way import way_of

    given, words = parse_words(arguments, EXEC_OPTIONS, "exec", early=True)
    if len(words) < 2:
        raise ConfigError("exec: no instance" if not words else "exec: no command", "`pyhv exec INSTANCE COMMAND ...`")
    instance = find(words[0])
    status = instance.status()
    if status != "running":
        raise StateError(f"{instance.name} is {status}", f"pyhv {'unpause' if status == 'paused' else 'start'} "
                         f"{instance.name}")
    way = way_of(instance)
    tty = bool(given.get("tty"))
    if tty and not given.get("detach") and given.get("interactive") and not os.isatty(0):
        raise ConfigError("exec -t: our standard input is no terminal", "leave -t out")
    env = Settings.of({"env": given.get("env", []), "env_file": given.get("env_file", []), "container": True}, []).env
    process = exec_process(way.config(instance), words[1:], tty=tty, env=env, workdir=given.get("workdir") or "")
    if given.get("user"):
        from hv.instance.users import find_user

        root = os.open(way.root(instance), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            user = find_user(root, given["user"], [])
        finally:
            os.close(root)
        process["user"] = {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups}
        sets = dict(process.get("capabilities") or {})
        granted = sets.get("bounding") or []
        sets |= {name: granted if user.uid == 0 else [] for name in ("effective", "permitted")}
        process["capabilities"] = sets
        process["env"] = [word for word in process["env"] if not word.startswith("HOME=")]
    if given.get("privileged"):
        from hv.linux.creds import CAPABILITIES, last_capability

        every = list(CAPABILITIES[:last_capability() + 1])
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), every)
    return way.exec(instance, process, interactive=bool(given.get("interactive")), detach=bool(given.get("detach")))
