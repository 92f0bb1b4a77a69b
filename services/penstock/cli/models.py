"""`penstock models`: what is served, and by whom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter
from google.protobuf.json_format import MessageToDict

from penstock.cli.connection import Connection, connected
from penstock.cli.tables import print_table
from penstock.v1 import models_pb2, models_pb2_grpc

__all__ = ["models"]


def models(
    *,
    executors: Annotated[bool, Parameter(negative=())] = False,
    connection: Annotated[Connection, Parameter(name="*")] = Connection(),
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """List the models that are served.

    Args:
        executors: Each model's executors too, with their load.
        connection: See its fields.
        as_json: One JSON list instead of a table.
    """
    with connected(connection) as channel:
        call = models_pb2_grpc.ModelsStub(channel).ListModels
        listed = call(models_pb2.ListModelsRequest(), timeout=connection.timeout, metadata=connection.metadata).models
    if as_json:
        plain = [MessageToDict(m, preserving_proto_field_name=True, always_print_fields_with_no_presence=True) for m in listed]
        print(json.dumps(plain if executors else [{k: v for k, v in m.items() if k != "executors"} for m in plain], indent=2))
    else:
        _print_tables(listed, executors=executors)
    return 0


def _print_tables(listed: Sequence[models_pb2.Model], *, executors: bool) -> None:
    headings = ("model", "architecture", "context", "vocabulary", "executors")
    print_table(headings, ((m.name, m.architecture, m.context_length, m.vocabulary_size, len(m.executors)) for m in listed))
    if executors:
        print()
        columns = ("model", "executor", "backend", "device", "dtype", "running", "waiting", "KV blocks free", "state")
        print_table(columns, ((model.name, *_cells(executor)) for model in listed for executor in model.executors))


def _cells(executor: models_pb2.ModelExecutor) -> tuple[object, ...]:
    e = executor
    free = f"{e.kv_blocks_free}/{e.kv_blocks}"
    return (e.executor_id, e.backend, e.device, e.dtype, e.running, e.waiting, free, "draining" if e.draining else "serving")
