"""NVIDIA FLARE: a job in its simulator, server and client in processes of their own, one round for each mechanism.

The filter of a round's mechanism stands where a job's configuration would put it, between the client's script and the
server's memory; the last filter on the server's side keeps what arrives.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import nvflare.client as flare
import torch
from bitsandbytes.functional import QuantState
from exchange import Mechanism, Task, keep, network
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.filters.exclude_vars import ExcludeVars
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from nvflare.app_common.filters.svt_privacy import SVTPrivacy
from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob
from nvflare.app_opt.pt.quantization import dequantizer
from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer
from nvflare.job_config.defs import FilterType
from nvflare.job_config.script_runner import ScriptRunner
from torch import Tensor, nn

CUT, HEAD = {"pruning": "top-k"}, ["fc3.weight", "fc3.bias"]
PERCENTILE = "percentile 10, gamma 0.01"
SVT = "fraction 0.1, ε 0.1, noise_var 0.1, gamma 1e-5, tau 1e-6"
CHANGE = "after - before"


def by_one_row(dequantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As a GPU dequantises: without one, bitsandbytes takes a matrix's blocks for blocks of its rows (findings)."""

    def whole(packed: Tensor, state: QuantState, **options: str) -> Tensor:
        shape, state.shape = state.shape, torch.Size([state.shape.numel()])
        return dequantize(packed, state, **options).reshape(shape)

    return whole


if not torch.cuda.is_available():  # the 8-bit and 4-bit filters ask for a GPU; bitsandbytes rounds the same way without
    Tensor.cuda = lambda tensor, *_, **__: tensor
    dequantizer.dequantize_4bit = by_one_row(dequantizer.dequantize_4bit)


def quantized(kind: str, **told: int) -> Mechanism:
    return Mechanism(f"ModelQuantizer {kind}", "in both directions, as a job sets it", CHANGE, told)


MECHANISMS = (
    (Mechanism("none", "transfer type FULL, the default"), None),
    (Mechanism("none (difference)", "transfer type DIFF", CHANGE), None),
    (Mechanism("PercentilePrivacy", PERCENTILE, CHANGE, CUT), PercentilePrivacy),
    (Mechanism("PercentilePrivacy (weights)", PERCENTILE, "weights", CUT), PercentilePrivacy),
    (Mechanism("SVTPrivacy", SVT, CHANGE), SVTPrivacy),
    (Mechanism("ExcludeVars", "the head, fc3 (no default)", CHANGE), lambda: ExcludeVars(HEAD)),
    (quantized("float16"), lambda: ModelQuantizer("float16")),
    (quantized("blockwise8", bits=8), lambda: ModelQuantizer("blockwise8")),
    (quantized("float4", bits=4), lambda: ModelQuantizer("float4")),
    (quantized("normfloat4", bits=4), lambda: ModelQuantizer("normfloat4")),
    (quantized("adaquant"), lambda: ModelQuantizer("adaquant")),
)


def task() -> Task:
    return Task.load(Path(os.environ["TASK"]))


class Net(nn.Sequential):
    """The network that the server begins with."""

    def __init__(self) -> None:
        super().__init__(OrderedDict(network(task().weights).named_children()))


class OfRound(DXOFilter):
    """The client's filter for this round's mechanism."""

    def __init__(self) -> None:
        super().__init__(supported_data_kinds=None, data_kinds_to_filter=None)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        make = MECHANISMS[dxo.meta["mechanism"]][1]
        return None if make is None else make().process_dxo(dxo, shareable, fl_ctx)


class Keep(DXOFilter):
    """The server's last filter: writes down what came; the server goes on with the weights that it had."""

    def __init__(self) -> None:
        super().__init__(supported_data_kinds=None, data_kinds_to_filter=None)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        (mechanism, kind), sent = MECHANISMS[dxo.meta["mechanism"]], task()
        if kind is not None and isinstance(kind(), ModelQuantizer):  # a plain message, its inverse does not stand
            dxo = dequantizer.ModelDequantizer().process_dxo(dxo, shareable, fl_ctx)
        assert dxo.data_kind == (DataKind.WEIGHTS if mechanism.sends == "weights" else DataKind.WEIGHT_DIFF)
        keep(Path(os.environ["KEEP"]), sent, "nvflare", mechanism, dxo.data)
        return DXO(DataKind.WEIGHTS, {name: weight.numpy() for name, weight in sent.weights.items()}, dxo.meta)


def client() -> None:
    """The client's training script: one step, then weights or their difference."""
    flare.init()
    while flare.is_running():
        number, sent = flare.receive().current_round, task()
        params, kind = sent.trained(), flare.ParamsType.FULL
        if MECHANISMS[number][0].sends == CHANGE:
            params, kind = _difference(params, sent.weights), flare.ParamsType.DIFF
        flare.send(flare.FLModel(params=params, params_type=kind, meta={"mechanism": number}))


def _difference(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - before[name] for name in before}


def capture(path: Path, folder: Path) -> None:
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    bin = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    os.environ |= {"TASK": str(path), "KEEP": str(folder), "PYTHONPATH": paths, "PATH": bin}
    from capture_nvflare import Keep, Net, OfRound  # as the server and the client will import them

    job = FedAvgJob(name=path.stem, n_clients=1, num_rounds=len(MECHANISMS), initial_model=Net())
    job.to(ScriptRunner(script=__file__, script_args="client"), "site-1")
    job.to(OfRound(), "site-1", tasks=["train"], filter_type=FilterType.TASK_RESULT)
    job.to(Keep(), "server", tasks=["train"], filter_type=FilterType.TASK_RESULT)
    job.simulator_run(str(folder / f"workspace-{path.stem}"), threads=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["client"]:
        client()
    else:
        capture(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
