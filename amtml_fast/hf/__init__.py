"""Hugging Face: a ``transformers.Trainer`` that distils from several teachers, by hidden states; needs ``pip install
"amtml-fast[hf]"``."""

from amtml_fast.hf.topk_store import StoredTopK, store_topk
from amtml_fast.hf.trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "StoredTopK", "store_topk"]
