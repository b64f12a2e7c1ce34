"""Shared fixtures: skip by probed ability, with the reason printed."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "" if os.access("/dev/kvm", os.R_OK | os.W_OK) else "/dev/kvm is absent or not accessible"
    for item in items:
        if "/kvm/" in str(item.path) and reason:
            item.add_marker(pytest.mark.skip(reason=reason))
