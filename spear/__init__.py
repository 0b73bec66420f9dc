"""What a federated-learning server can read back, exactly, from a client's gradient.

client     spear.federated.gradient   model, batch -> SharedUpdate
attacker   spear.attack               model, SharedUpdate -> Reconstruction; never sees the batch
judge      spear.metrics.evaluate     Reconstruction, batch -> Evaluation
"""

from spear import data, federated, metrics, models
from spear.federated import SharedUpdate
from spear.inversion import attack
from spear.metrics import Evaluation
from spear.reconstruction import Reconstruction

__all__ = ["Evaluation", "Reconstruction", "SharedUpdate", "attack", "data", "federated", "metrics", "models"]
