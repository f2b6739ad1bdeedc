"""fedcore: the cloud side of federated learning, speaking the MindSpore Federated 0.1 device protocol."""

__version__ = "0.1.0"
