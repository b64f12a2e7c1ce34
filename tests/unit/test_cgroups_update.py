"""New limits merged onto old ones."""

from __future__ import annotations

import pytest

from hv.container.update import merge, update
from hv.errors import ConfigError


class Group:
    """Notes what is applied; refuses a pids limit of 13."""

    def __init__(self):
        self.applied = []

    def apply(self, resources, *, update=False):
        assert update
        self.applied.append(resources)
        if resources.get("pids", {}).get("limit") == 13:
            raise ConfigError("linux.resources.pids.limit: 13")


def test_merge():
    old = {"memory": {"limit": 5, "swap": 9}, "devices": [1], "pids": {"limit": 3}}
    assert merge(old, {"memory": {"limit": 7, "reservation": 1, "swap": None}, "cpu": {"shares": 4},
                       "devices": [2]}) == {
        "memory": {"limit": 7, "swap": 9, "reservation": 1}, "devices": [2], "pids": {"limit": 3}, "cpu": {"shares": 4}}
    assert old["memory"] == {"limit": 5, "swap": 9}


def test_what_belongs_together_is_applied_together_and_noted():
    group, config = Group(), {"linux": {"resources": {"memory": {"limit": 5, "swap": 9, "reservation": 2},
                                                      "cpu": {"quota": 8, "shares": 3}}}}
    update(group, config, {"memory": {"limit": 7}, "cpu": {"period": 6, "quota": 0}, "pids": None})
    assert group.applied == [{"memory": {"limit": 7, "swap": 9}, "cpu": {"period": 6, "quota": 8}}]
    assert config["linux"]["resources"]["memory"] == {"limit": 7, "swap": 9, "reservation": 2}


def test_unlimited_memory_takes_the_limit_on_swap_away():
    group, config = Group(), {"linux": {"resources": {"memory": {"limit": 5, "swap": 9}}}}
    update(group, config, {"memory": {"limit": -1}})
    assert group.applied == [{"memory": {"limit": -1, "swap": -1}}]
    assert config["linux"]["resources"]["memory"] == {"limit": -1, "swap": -1}


def test_a_refused_update_sets_the_old_limits_back():
    group, config = Group(), {"linux": {"resources": {"memory": {"limit": 5}, "pids": {"limit": 3},
                                                      "cpu": {"shares": 9}}}}
    with pytest.raises(ConfigError):
        update(group, config, {"memory": {"limit": 7}, "pids": {"limit": 13}})
    assert group.applied[-1] == {"memory": {"limit": 5}, "pids": {"limit": 3}}
    assert config["linux"]["resources"]["pids"] == {"limit": 3}


def test_a_container_without_limits_can_get_some():
    group, config = Group(), {}
    update(group, config, {"pids": {"limit": 4}})
    assert config == {"linux": {"resources": {"pids": {"limit": 4}}}}
