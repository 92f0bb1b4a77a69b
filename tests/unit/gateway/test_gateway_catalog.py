import pytest

from penstock.common.errors import InvalidRequest, Unavailable, UnknownModel
from penstock.gateway.catalog import Catalog, Executor


class World:
    """A catalog that remembers for a minute, and its clock."""

    def __init__(self):
        self.now = 0.0
        self.catalog = Catalog(60.0, lambda: self.now)

    def serve(self, *models, more=False):
        self.catalog.update([executor(model) for model in models], more=more)


def executor(model):
    return Executor(executor_id=model, address="h:1", model=model, context_length=1, vocabulary_size=1, kv_block_size=1)


def test_no_model_is_unknown_while_the_scheduler_may_not_have_heard_of_it():
    world = World()
    world.serve("a", more=True)
    for find in (world.catalog.model, world.catalog.live):
        with pytest.raises(Unavailable) as waits:
            find("b")
        assert waits.value.retry_after
    world.serve("a")
    with pytest.raises(UnknownModel):
        world.catalog.model("b")
    world.catalog.more()
    with pytest.raises(Unavailable):
        world.catalog.model("b")
    world.serve("a", "b", more=True)
    assert world.catalog.model("b").name == "b"


def test_replaced_model_is_none_to_choose_from():
    world = World()
    world.serve("old")
    world.serve("new")
    assert world.catalog.model("").name == "new"
    with pytest.raises(UnknownModel) as unknown:
        world.catalog.model("typo")
    assert "new" in str(unknown.value)
    assert "old" not in str(unknown.value)
    world.serve("new", "other")
    with pytest.raises(InvalidRequest, match="new, other"):
        world.catalog.model("")


def test_model_whose_executors_restart_stays_known_for_a_while_and_no_longer():
    world = World()
    world.serve("a", "b")
    world.serve("b")
    world.now = 59.0
    world.serve("b")
    assert world.catalog.model("a").name == "a"
    assert list(world.catalog.models()) == ["b"]
    with pytest.raises(Unavailable):
        world.catalog.live("a")
    world.now = 61.0
    for find in (world.catalog.model, world.catalog.live):
        with pytest.raises(UnknownModel):
            find("a")
    world.serve("a", "b")
    world.now = 1000.0
    assert world.catalog.model("a").name == "a", "it is served: only what is gone is forgotten"


def test_only_model_is_meant_without_a_name_while_its_executors_restart():
    world = World()
    world.serve("a")
    world.serve()
    assert world.catalog.model("").name == "a"
    world.now = 61.0
    with pytest.raises(Unavailable):
        world.catalog.model("")


def test_the_only_model_that_is_gone_for_good_is_unknown_by_its_name():
    world = World()
    world.serve("a")
    world.serve()
    world.now = 61.0
    with pytest.raises(UnknownModel):
        world.catalog.model("a")
