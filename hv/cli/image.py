"""`pyhv image ls`, `inspect`, `history`. Driven by tests/unit/test_cli_image.py."""

from __future__ import annotations

__all__ = ["history", "inspect", "list_images"]

import sys
import time
from collections.abc import Callable
from typing import Any

from hv.cli.say import say
from hv.cli.table import age, human, print_rows, render
from hv.errors import HvError, ImageError
from hv.image.filters import created, matcher
from hv.image.image import Image
from hv.image.media import Descriptor
from hv.image.reference import Reference
from hv.image.store import Store

_NONE = "<none>"            # as docker and podman print what has no name
_SHORT = 12                 # digits of a shortened ID, theirs too
_CREATED_BY = 45            # characters of a step, as docker's history shows
_FILTERS = ("dangling", "label", "reference", "before", "since", "until")


def list_images(name: str, everything: bool = False, digests: bool = False, filters: tuple[str, ...] = (),
                form: str = "", no_trunc: bool = False, quiet: bool = False) -> int:
    """Print the table of images, the newest first; one that can't be read is named, and makes the exit code 1."""
    store = Store()
    matches, named = matcher(filters, store, _FILTERS), _named(name, store)
    rows, damaged = [], 0
    for label, item in store.entries():
        try:
            image = store.load(item, label, listed=True)
        except HvError as error:
            damaged += 1
            say(f"pyhv: {error}" + (f" - {error.hint}" if error.hint else ""))
            continue
        if named(label, image) and matches(label, image):
            rows.append(_row(label, item, image, no_trunc))
    rows.sort(key=lambda row: (-row["_created"], row["Repository"], row["Tag"]))
    columns = {"REPOSITORY": "Repository", "TAG": "Tag"} | ({"DIGEST": "Digest"} if digests else {}) | {
        "IMAGE ID": "ID", "CREATED": "CreatedSince", "SIZE": "Size"}
    shown = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    print_rows(shown, columns, form, quiet="ID" if quiet else "")
    return 1 if damaged else 0


def _named(text: str, store: Store) -> Callable[[str, Image], bool]:
    """What the argument of `ls` asks for: nothing, a repository, a whole name, or a pattern."""
    if not text:
        return lambda name, image: True
    if set(text) & set("*?["):
        return matcher([f"reference={text}"], store, _FILTERS)
    wanted = Reference.parse(text)
    if wanted.digest or ":" in text.rpartition("/")[2]:
        return lambda name, image: name == str(wanted)
    return lambda name, image: bool(name) and Reference.parse(name).name == wanted.name


def _row(name: str, item: Descriptor, image: Image, whole: bool) -> dict[str, Any]:
    reference = Reference.parse(name) if name else None
    moment = created(image)
    return {"Repository": reference.familiar_name() if reference else _NONE,
            "Tag": (reference.tag if reference else "") or _NONE, "ID": image.id if whole else _short(image.id),
            "Digest": image.index or image.digest, "CreatedSince": _since(moment), "CreatedAt": image.config.created,
            "Size": human(image.size), "Bytes": image.size, "Platform": image.config.platform, "Name": name,
            "_created": moment}


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_SHORT]


def _since(moment: float) -> str:
    return age(time.time() - moment) if moment else "N/A"


def inspect(names: tuple[str, ...], form: str = "", platform: str = "") -> int:
    """Print what the images are, as `docker inspect` does."""
    store, found, failed = Store(), [], 0
    for name in names:
        try:
            found.append(_described(store, store.resolve(name, platform)))
        except ImageError as error:
            failed = 1
            say(f"pyhv: {error}" + (f" - {error.hint}" if error.hint else ""))
    if form and form != "json":
        sys.stdout.write("".join(render(form, item) + "\n" for item in found))
    else:
        from json import dumps

        sys.stdout.write(dumps(found, indent=4) + "\n")
    return failed


def _described(store: Store, image: Image) -> dict[str, Any]:
    from json import loads

    config = image.config
    digests = {image.digest, image.index or image.digest}
    names = [name for name, item in store.entries() if name and item.digest in digests]
    references = [Reference.parse(name) for name in names]
    users = sorted(store.users().get(image.id, {}))
    return {
        "Id": image.id, "Digest": image.index or image.digest,
        "RepoTags": [name for name, reference in zip(names, references, strict=True) if reference.tag],
        "RepoDigests": sorted({f"{reference.name}@{image.index or image.digest}" for reference in references}),
        "Created": config.created, "Architecture": config.architecture, "Variant": config.variant, "Os": config.os,
        "Size": image.size, "Config": loads(config.raw).get("config") or {},
        "RootFS": {"Type": "layers", "Layers": list(config.diff_ids)},
        "Layers": [{"Digest": layer.digest, "MediaType": layer.media_type, "Size": layer.size, "DiffID": diff_id}
                   for layer, diff_id in image.layers],
        "ManifestType": image.manifest.media_type, "Labels": config.labels, "Annotations": image.manifest.annotations,
        "User": config.user, "History": config.history, "UsedBy": users,
    }


def history(name: str, human: bool = True, form: str = "", no_trunc: bool = False, quiet: bool = False) -> int:
    """Print the steps. A step's size is its layer's as it is kept."""
    image = Store().resolve(name)
    layers = [layer for layer, _ in image.layers]
    rows: list[dict[str, Any]] = []
    for step in image.config.history:
        layer = layers.pop(0) if not step.get("empty_layer") and layers else None
        rows.append(_step(step, layer.size if layer else 0, human, no_trunc))
    for layer in layers:                    # more layers than the history has steps
        rows.append(_step({}, layer.size, human, no_trunc))
    rows.reverse()
    if rows:
        rows[0]["ID"] = image.id if no_trunc else _short(image.id)
    print_rows(rows, {"IMAGE": "ID", "CREATED": "CreatedSince" if human else "CreatedAt", "CREATED BY": "CreatedBy",
                      "SIZE": "Size", "COMMENT": "Comment"}, form, quiet="ID" if quiet else "")
    return 0


def _step(step: dict[str, Any], size: int, people: bool, whole: bool) -> dict[str, Any]:
    from datetime import datetime

    at, by = str(step.get("created") or ""), str(step.get("created_by") or "")
    try:
        since = _since(max(datetime.fromisoformat(at).timestamp(), 0))
    except (ValueError, OverflowError, OSError):
        since = "N/A"
    if not whole and len(by) > _CREATED_BY:
        by = by[:_CREATED_BY - 1] + "…"
    return {"ID": "<missing>", "CreatedSince": since, "CreatedAt": at, "CreatedBy": by,
            "Size": human(size) if people else str(size), "Comment": str(step.get("comment") or "")}
