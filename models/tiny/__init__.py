"""braid-tiny, the embedded model: its checkpoint, and everything that made it.

`names` and `world` write the invented documents and questions, `tokenizer` and `layout` turn them into ids, `data`
packs ids into training rows, `train` trains, and `evaluate` measures. Only the last three import torch.
"""

from pathlib import Path

__all__ = ["CHECKPOINT"]

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The shipped checkpoint: a folder that `transformers` loads as it is."""
