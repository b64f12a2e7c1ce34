"""The options of `pyhv run` and `pyhv create`: names and meanings as docker and podman have them.

Driven by tests/unit/test_cli_words.py and tests/root/test_instance_options.py.
"""

from __future__ import annotations

__all__ = ["CREATE_OPTIONS", "RUN_OPTIONS"]

from hv.cli.words import Opt

CREATE_OPTIONS = (
    Opt("container", help="run it as a container [default; PYHV_WAY=vm changes that]"),
    Opt("vm", help="run it in a virtual machine of its own"),
    Opt("interactive", "", "keep standard input open", "i"),
    Opt("tty", "", "give it a terminal", "t"),
    Opt("rm", "", "remove it when it has ended"),
    Opt("name", "NAME", "what it is called [default: an adjective and a noun]"),
    Opt("env", "NAME[=VALUE]", "a variable of its environment; without a value: ours", "e", many=True),
    Opt("env-file", "FILE", "variables, one a line", many=True),
    Opt("entrypoint", "PROGRAM", "in place of the image's; then the image's command is dropped"),
    Opt("workdir", "DIR", "its directory, made if missing", "w"),
    Opt("user", "NAME|UID[:GROUP]", "who it is, as the image's /etc/passwd has it", "u"),
    Opt("group-add", "GROUP", "one more group", many=True),
    Opt("volume", "[SOURCE:]TARGET[:ro]", "a folder of the host, or a volume by name", "v", many=True),
    Opt("mount", "type=...,target=...", "bind, volume or tmpfs, in words", many=True),
    Opt("tmpfs", "TARGET[:OPTIONS]", "a file system in memory", many=True),
    Opt("read-only", "", "its root can't be written", key="readonly"),
    Opt("publish", "[[IP:]PORT:]PORT[/udp]", "a port of it on the host", "p", many=True),
    Opt("publish-all", "", "all ports that the image exposes, on free ones", "P"),
    Opt("network", "NAME", "none, host, container:NAME, or a network [default: pyhv]", many=True),
    Opt("net", "NAME", many=True, key="network"),
    Opt("network-alias", "NAME", "one more name for it in its network", many=True),
    Opt("ip", "ADDRESS", "its address"),
    Opt("mac-address", "MAC", "its card's"),
    Opt("hostname", "NAME", "its host name [default: the beginning of its ID]", "h"),
    Opt("add-host", "HOST:IP", "a line of its /etc/hosts", many=True),
    Opt("dns", "IP", "a name server", many=True),
    Opt("dns-search", "DOMAIN", "a search domain", many=True),
    Opt("memory", "SIZE", "its memory at most; a VM's RAM", "m"),
    Opt("memory-swap", "SIZE", "memory and swap; -1 without bound"),
    Opt("cpus", "NUMBER", "processors: 0.5, 2"),
    Opt("cpu-shares", "WEIGHT", "its share where processors are busy", "c"),
    Opt("cpuset-cpus", "LIST", "on these alone: 0-3,7"),
    Opt("pids-limit", "NUMBER", "processes at most"),
    Opt("ulimit", "NAME=SOFT[:HARD]", "a limit of setrlimit(2): nofile=1024", many=True),
    Opt("sysctl", "NAME=VALUE", "a kernel parameter of its namespaces", many=True),
    Opt("shm-size", "SIZE", "of /dev/shm [64m]"),
    Opt("oom-score-adj", "NUMBER", "how soon it is killed when the host's memory runs out"),
    Opt("cap-add", "NAME", "one more capability, or ALL", many=True),
    Opt("cap-drop", "NAME", "one less, or ALL", many=True),
    Opt("privileged", "", "all capabilities, all devices, nothing masked, no filter"),
    Opt("security-opt", "WHAT", "no-new-privileges, seccomp=unconfined|FILE, ...", many=True),
    Opt("device", "HOST[:INSIDE[:rwm]]", "a device of the host", many=True),
    Opt("init", "", "a first process that reaps what others leave"),
    Opt("label", "NAME=VALUE", "kept with it, for filters", "l", many=True),
    Opt("restart", "POLICY", "no, on-failure[:TIMES], always, unless-stopped"),
    Opt("stop-signal", "SIGNAL", "what `stop` sends [the image's, or TERM]"),
    Opt("stop-timeout", "SECONDS", "then `stop` kills it [10]"),
    Opt("log-opt", "NAME=VALUE", "max-size=SIZE, max-file=NUMBER", many=True),
    Opt("log-driver", "NAME", "json-file"),
    Opt("pull", "WHEN", "fetch the image: missing, always, never [missing]"),
    Opt("quiet", "", "no progress of a pull", "q"),
    Opt("cidfile", "FILE", "write its ID there"),
    Opt("kernel", "FILE", "of a VM: another kernel than pyhv's"),
    Opt("initrd", "FILE", "of a VM: and its RAM disk"),
)
RUN_OPTIONS = (
    *CREATE_OPTIONS,
    Opt("detach", "", "leave it running, print its ID", "d"),
    Opt("detach-keys", "KEYS", "that leave it running [ctrl-p,ctrl-q]"),
    Opt("sig-proxy", "", "pass signals on to it [true; --sig-proxy=false]"),
    Opt("attach", "STREAM", "docker's: all are attached", "a", many=True),
)
