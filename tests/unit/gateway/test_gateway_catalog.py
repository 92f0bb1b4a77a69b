import pytest

from penstock.common.errors import Unavailable, UnknownModel
from penstock.gateway.catalog import Catalog, Executor


def executor(model):
    return Executor(executor_id=model, address="h:1", model=model, context_length=1, vocabulary_size=1, kv_block_size=1)


def test_no_model_is_unknown_while_the_scheduler_may_not_have_heard_of_it():
    catalog = Catalog()
    catalog.update([executor("a")], more=True)
    with pytest.raises(Unavailable) as waits:
        catalog.model("b")
    assert waits.value.retry_after
    catalog.update([executor("a")])
    with pytest.raises(UnknownModel):
        catalog.model("b")
    catalog.more()
    with pytest.raises(Unavailable):
        catalog.model("b")
    catalog.update([executor("a"), executor("b")], more=True)
    assert catalog.model("b").name == "b"
