"""What a federated-learning server can read back, exactly, from a client's gradient.

client     spear.federated.gradient   model, batch -> SharedUpdate
attacker   spear.attack               model, SharedUpdate -> Reconstruction; never sees the batch
judge      spear.metrics.evaluate     Reconstruction, batch -> Evaluation

Where to look: `published` SPEAR as published, in reading order; `descent` one layer beyond sampling; `network` every
layer; `certificate` when a batch is beyond doubt; `deployments` updates as real clients send them; `federated` what is
sent, and defences; `audit` your own model.
Names are imported when they are first used: the command line must answer before torch has loaded.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["data", "federated", "metrics", "models"],
    submod_attrs={
        "federated": ["SharedUpdate"],
        "inversion": ["attack"],
        "metrics": ["Evaluation"],
        "reconstruction": ["Reconstruction"],
    },
)
