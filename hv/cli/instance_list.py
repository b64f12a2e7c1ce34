"""`pyhv ps`, `inspect`, `port`. Driven by tests/root/test_instance_list.py."""

from __future__ import annotations

__all__ = ["command_inspect", "command_port", "command_ps"]

from hv.cli.say import say
from hv.cli.words import Opt, parse_words
from hv.errors import ConfigError, HvError
from hv.instance.names import SHORT
from hv.instance.records import all_instances, find
from hv.instance.show import COLUMNS, matches, row_of
from hv.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.instance.record import Instance

PS_OPTIONS = (
    Opt("all", "", "those that do not run as well", "a"),
    Opt("quiet", "", "IDs alone", "q"),
    Opt("no-trunc", "", "in full"),
    Opt("last", "NUMBER", "the latest ones, running or not", "n"),
    Opt("latest", "", "the latest one", "l"),
    Opt("filter", "WHAT=VALUE", "name, id, status, ancestor, label, exited, kind, network, volume", "f", many=True),
    Opt("format", "json|TEMPLATE", "each as JSON, or as {{.ID}} {{.Names}} ... says"),
)
INSPECT_OPTIONS = (Opt("format", "TEMPLATE", "a part of it: {{.State.Status}}", "f"),)
PORT_OPTIONS: tuple[Opt, ...] = ()


def command_ps(arguments: list[str]) -> int:
    """ps [options]"""
    from hv.instance.values import number

    given, words = parse_words(arguments, PS_OPTIONS, "ps")
    if words:
        raise ConfigError(f"ps: {words[0]!r:.40}: it takes no names", "`pyhv ps -a -f name=NAME`")
    filters = [_filter(text) for text in given["filter"]]
    everything = given.get("all") or given.get("last") or given.get("latest") or any(
        key in ("status", "exited") for key, _ in filters)
    rows = all_instances()
    _settled(rows)
    most = number(given["last"], "-n", 0, 1 << 30) if given.get("last") else 1 if given.get("latest") else None
    found = [instance for instance in rows if matches(instance, filters)
             and (everything or instance.status() in ("running", "paused", "restarting"))][:most]
    if given.get("quiet"):
        for instance in found:
            print(instance.id if given.get("no_trunc") else instance.id[:SHORT])
        return 0
    lines = [row_of(instance, full=bool(given.get("no_trunc"))) for instance in found]
    if given.get("format") == "json":
        for line in lines:
            print(dumps(line))
        return 0
    if given.get("format"):
        from hv.cli.template import fill

        for line in lines:
            print(fill(given["format"], line))
        return 0
    _table([title for _, title in COLUMNS], [[line[key] for key, _ in COLUMNS] for line in lines])
    return 0


def _filter(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or key not in ("name", "id", "status", "ancestor", "label", "exited", "kind", "network", "volume"):
        raise ConfigError(f"--filter {text!r:.60}", "name=, id=, status=, ancestor=, label=, exited=, kind=, network=, "
                          "volume=")
    return key, value


def _settled(rows: list[Instance]) -> None:
    """Where something has ended that nobody has written down, have a keeper do that first."""
    if any((instance.state.get("status") in ("running", "paused", "restarting") or instance.has_begun)
           and not instance.running for instance in rows):
        from hv.instance import keeper_client

        keeper_client.ensure()
        for instance in list(rows):
            try:
                instance.refresh()
            except HvError:
                rows.remove(instance)


def _table(titles: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[at]) for row in [titles, *rows]) for at in range(len(titles))]
    for row in [titles, *rows]:
        print("   ".join(f"{word:{width}}" for word, width in zip(row, widths, strict=True)).rstrip())


def command_inspect(arguments: list[str]) -> int:
    """inspect [-f TEMPLATE] INSTANCE ..."""
    from hv.instance.inspect import describe

    given, words = parse_words(arguments, INSPECT_OPTIONS, "inspect")
    if not words:
        raise ConfigError("inspect: name an instance", "`pyhv ps -a` shows those there are")
    found, failed = [], 0
    for word in words:
        try:
            found.append(describe(find(word)))
        except HvError as error:
            say(f"pyhv: {error}" + (f" - {error.hint}" if error.hint else ""))
            failed = 1
    if given.get("format"):
        from hv.cli.template import fill

        for one in found:
            print(fill(given["format"], one))
    else:
        print(dumps(found, 4))
    return failed


def command_port(arguments: list[str]) -> int:
    """port INSTANCE [PORT[/PROTOCOL]]"""
    from hv.instance.show import published

    _, words = parse_words(arguments, PORT_OPTIONS, "port")
    if not 1 <= len(words) <= 2:
        raise ConfigError("port: an instance, and perhaps a port of it", "`pyhv port INSTANCE 80/tcp`")
    instance = find(words[0])
    ports = published(instance)
    if len(words) == 2:
        wanted = words[1] if "/" in words[1] else words[1] + "/tcp"
        ports = [port for port in ports if f"{port.inner}/{port.protocol}" == wanted]
        if not ports:
            raise HvError(f"{instance.name}: port {wanted} is not published")
    for port in ports:
        text = f"{port.address}:{port.host}"
        print(text if len(words) == 2 else f"{port.inner}/{port.protocol} -> {text}")
    return 0
