"""A client as Flower's users write it: weights in, one step of SGD on its own images, weights out. No spear in it."""

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

COUNT, RATE = 6, 0.5
app = ClientApp()


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 10))


def private(partition: int) -> tuple[Tensor, Tensor]:
    """What only the client of that partition has."""
    generator = torch.Generator().manual_seed(partition)
    return torch.randn(COUNT, 1, 8, 8, generator=generator), torch.randint(10, (COUNT,), generator=generator)


@app.train()
def train(message: Message, context: Context) -> Message:
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = private(int(context.node_config["partition-id"]))
    F.cross_entropy(model(images), labels).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= RATE * parameter.grad
    records = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": COUNT})}
    return Message(content=RecordDict(records), reply_to=message)
