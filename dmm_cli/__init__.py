"""dmm merges model checkpoints trained apart, without any of the data they were trained on."""

__version__ = "0.1.0"
