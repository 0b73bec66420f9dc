"""Flower's strategy hook: a strategy that looks at every client's update before another strategy aggregates it.

Needs the extra: `pip install "spear[flower]"`. It works on Flower's message API (`flwr.serverapp`), no Ray.
"""

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from spear.audit.monitor import Monitor

EXAMPLES = "num-examples"  # the metric in which Flower's clients say how many samples they used


class MonitoredStrategy(Strategy):
    """`strategy`, with every update that a client returns shown to `monitor` first (see `spear.audit.monitor.Monitor`).

    Aggregation is left as it is: the monitor warns, and what its callback raises ends the run. A reply without weights
    (a client's error) is passed on unseen.
    """

    def __init__(self, strategy: Strategy, monitor: Monitor) -> None:
        self.strategy, self.monitor = strategy, monitor
        self._sent: dict[int, dict[str, Tensor]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's messages; the weights in each are remembered."""
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = {message.metadata.dst_node_id: _weights(message) for message in messages}
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's aggregate, once the monitor has looked at each reply."""
        replies = list(replies)
        for reply in replies:
            if reply.has_content() and reply.content.array_records:
                client = reply.metadata.src_node_id
                self.monitor.look(
                    self._sent[client], _weights(reply), client=str(client), round=server_round, count=_count(reply)
                )
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the strategy does."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the strategy does."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        """As the strategy does."""
        self.strategy.summary()


def _weights(message: Message) -> dict[str, Tensor]:
    (arrays, *_) = message.content.array_records.values()
    return arrays.to_torch_state_dict()


def _count(reply: Message) -> int | None:
    """How many samples the client says it used."""
    metrics = [record for record in reply.content.metric_records.values() if EXAMPLES in record]
    return int(metrics[0][EXAMPLES]) if metrics else None
