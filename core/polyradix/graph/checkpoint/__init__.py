"""Where weights come from: a folder of safetensors, a GGUF file, a Hub id, `demo`, or random numbers."""

from polyradix.graph.checkpoint.base import Checkpoint
from polyradix.graph.checkpoint.find import fetch_demo, open_checkpoint
from polyradix.graph.checkpoint.load import load_params

__all__ = ["Checkpoint", "fetch_demo", "load_params", "open_checkpoint"]
