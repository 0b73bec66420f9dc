"""A watch on what clients send: the server, or whoever audits it, attacks each update and warns where it can be read.

For Flower see `spear.audit.flower`; any other framework calls `Monitor.look` where it receives a client's weights.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from torch import Tensor, nn

from spear import inversion
from spear.federated.naming import match
from spear.federated.update import SharedUpdate, difference
from spear.reconstruction import Reconstruction

log = logging.getLogger("spear.monitor")


@dataclass(frozen=True)
class Finding:
    """What the monitor saw of one client in one round. `result` is None where the attack could not start: `reason`.

    So is `update` where the client's weights are none of the model's.
    """

    client: str
    round: int
    update: SharedUpdate | None
    result: Reconstruction | None
    reason: str

    @property
    def leaks(self) -> bool:
        """Whether at least one sample was read back from the update."""
        return self.result is not None and len(self.result.inputs) > 0

    @property
    def words(self) -> str:
        """One line for a log: who, when, and how much."""
        who = f"round {self.round}, client {self.client}"
        if self.result is None:
            return f"{who}: the update could not be attacked ({self.reason})"
        if not self.leaks:
            return f"{who}: no sample could be read back ({self.reason})"
        found, certified = len(self.result.inputs), int(self.result.certified.sum())
        return (
            f"{who}: the update is invertible, {found} of {self.result.rank} samples read back, {certified} certified"
        )


@dataclass(frozen=True)
class Monitor:
    """Attacks updates of `model` that are one step of SGD with `learning_rate`, each for at most `time_limit` seconds.

    An invertible update is a warning in the log `spear.monitor`, and so is one that cannot be attacked. `on_finding` is
    called with every finding, invertible or not; what it raises ends the round. With `folder`, every update is kept
    there as ROUND-CLIENT.safetensors (the client's name percent-encoded), for `spear audit`. `input_shape` is the shape
    of one sample, where it is known.
    """

    model: nn.Module
    learning_rate: float | int
    time_limit: float | int = 10
    input_shape: tuple[int, ...] | None = None
    on_finding: Callable[[Finding], None] | None = None
    folder: Path | None = None

    def look(
        self,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        *,
        client: str,
        round: int = 1,
        count: int | None = None,
    ) -> Finding:
        """Attack one update, given as the weights that the client received and those that it sent back.

        `count` is the number of samples that the client says it used. What a client sent that is no change of these
        weights is a finding without an update.
        """
        try:
            model, update = self._received(before, after, count)
        except Exception as error:  # a client may send anything, which shall not end the round
            return self._tell(Finding(client, round, None, None, _cause(error)))
        if self.folder is not None:
            update.save(self.folder / f"{round}-{quote(client, safe='')}.safetensors")
        try:
            result = inversion.attack(model, update, time_limit=self.time_limit)
            finding = Finding(client, round, update, result, result.reason)
        except Exception as error:  # the same
            finding = Finding(client, round, update, None, _cause(error))
        return self._tell(finding)

    def _received(
        self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], count: int | None
    ) -> tuple[nn.Module, SharedUpdate]:
        """The model with the weights that were sent, and their change. Buffers that were not sent are the monitor's."""
        model = copy.deepcopy(self.model)
        sent = {own: before[name] for own, name in match(model, before).names.items()}
        sent |= {name: before[name] for name, _ in model.named_buffers() if name in before}
        try:
            model.load_state_dict(sent, strict=False)
        except RuntimeError as error:  # another shape
            raise ValueError(f"the weights are not the model's: {' '.join(str(error).split())}") from error
        options = {"learning_rate": self.learning_rate, "count": count, "input_shape": self.input_shape}
        return model, difference(model, before, after, **options)

    def _tell(self, finding: Finding) -> Finding:
        """The finding, in the log and to whoever listens."""
        quiet = finding.result is not None and not finding.leaks
        log.log(logging.INFO if quiet else logging.WARNING, finding.words)
        if self.on_finding is not None:
            self.on_finding(finding)
        return finding


def _cause(error: Exception) -> str:
    """What went wrong, in words; with its type where it was not foreseen."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
