"""An image that `pyhv run` needs and the store lacks. Driven by tests/root/test_instance_options.py."""

from __future__ import annotations

__all__ = ["fetch"]

from hv.cli.say import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hv.image.image import Image
    from hv.image.store import Store


def fetch(store: Store, text: str, quiet: bool) -> Image:
    """Pull `text`; with a line about it, unless `quiet`."""
    from hv.image.pull import pull
    from hv.image.reference import Reference

    reference = Reference.parse(text)
    if not quiet:
        say(f"pyhv: pulling {reference.familiar()}")
    return pull(store, reference)
