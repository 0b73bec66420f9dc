"""Updates as real clients send them: `noise`, `pruning`, `local_training`. Notebook 12_federated."""
