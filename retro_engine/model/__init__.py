"""The network: what it computes is written down in docs/model.md."""
