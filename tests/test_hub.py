"""One way to download from the hub: quick to fail, from the cache without a network, with advice."""

import sys

import datasets
import pytest
from huggingface_hub import constants

from puma_lightning import hub


def offline() -> bool:
    """What the hub's library asks itself; earlier ones look at the constant."""
    return constants.is_offline_mode() if hasattr(constants, "is_offline_mode") else constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("answers", [True, False])
def test_libraries_are_offline_inside_if_the_hub_is_out_of_reach(monkeypatch, answers):
    for settings in (constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_hub_answers", lambda: answers)
    with hub.from_hub("data", "a/b", "a file"):
        assert offline() == datasets.config.HF_HUB_OFFLINE == (not answers)
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_data_sets_are_not_imported_for_other_downloads(monkeypatch):
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    for name in [name for name in sys.modules if name.split(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, name)
    with hub.from_hub("weights", "a/b", "a folder"):
        assert offline()
    assert "datasets" not in sys.modules


@pytest.mark.parametrize(
    ("is_set", "answers", "state"),
    [(True, True, "HF_HUB_OFFLINE is set"), (False, False, "hub can't be reached"), (False, True, "hub failed")],
)
def test_a_failure_says_why_and_what_to_give_instead(monkeypatch, is_set, answers, state):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_set)
    monkeypatch.setattr(hub, "_hub_answers", lambda: answers)
    message = rf"data: found no file 'a/b', and .*{state} \(OSError: no such thing\); give a file instead"
    with pytest.raises(ValueError, match=message), hub.from_hub("data", "a/b", "a file"):
        raise OSError("no such thing\nand much more")
