"""What Prometheus is told of an executor's handoffs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.executor.handoff.counts import HandoffCounts

__all__ = ["HandoffMetrics"]

_BYTES = "Payload of KV that arrived here, by transport."
_SECONDS = "Time that it took, from first pushes to last imports."


class HandoffMetrics(Collector):
    """`HandoffCounts` at the moment. Bytes and seconds are told by the side that decodes alone, so that a sum has them once."""

    def __init__(self, counts: HandoffCounts, model: str) -> None:
        self._counts = counts
        self._model = model

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._ended()
        live = GaugeMetricFamily("penstock_handoffs_live", "Handoffs under way, by side.", labels=["model_name", "side"])
        live.add_metric([self._model, "prefill"], counts.sending)
        live.add_metric([self._model, "decode"], counts.receiving)
        yield live
        moved = {transport.value: moved for transport, moved in counts.moved.copy().items()}
        yield self._counter("kv_bytes", _BYTES, "transport", {name: m.bytes for name, m in moved.items()})
        yield self._counter("seconds", _SECONDS, "transport", {name: m.seconds for name, m in moved.items()})
        exported = {transport.value: size for transport, size in counts.exported.copy().items()}
        yield self._counter("pushed_bytes", "Payload that was pushed from here, repeated pushes included.", "transport", exported)
        refusals = {reason.value: count for reason, count in counts.refusals.copy().items()}
        yield self._counter("refusals", "Messages of other executors that were not obeyed, by reason.", "reason", refusals)
        resumed = CounterMetricFamily("penstock_handoff_resumptions", "Handoffs gone on with after a loss.", labels=["model_name"])
        resumed.add_metric([self._model], counts.resumptions)
        yield resumed

    def _ended(self) -> Metric:
        family = CounterMetricFamily("penstock_handoffs", "Ended handoffs, by side.", labels=["model_name", "side", "outcome"])
        for side, outcomes in (("prefill", self._counts.sent), ("decode", self._counts.received)):
            for outcome, count in outcomes.copy().items():
                family.add_metric([self._model, side, outcome], count)
        return family

    def _counter(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(f"penstock_handoff_{name}", text, labels=["model_name", label])
        for value, count in values.items():
            family.add_metric([self._model, value], count)
        return family
