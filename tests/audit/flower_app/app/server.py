"""The server: FedAvg, watched. Every update that the strategy sees is kept in the folder that the run names."""

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from app.client import RATE, network
from spear.audit.flower import MonitoredStrategy
from spear.audit.monitor import Monitor

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    model, folder = network(), Path(str(context.run_config["folder"]))
    monitor = Monitor(model, RATE, input_shape=(1, 8, 8), folder=folder)
    strategy = MonitoredStrategy(FedAvg(fraction_evaluate=0.0), monitor)
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=1)
