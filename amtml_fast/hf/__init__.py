"""Hugging Face: a ``transformers.Trainer`` that distils from several teachers, by hidden states; needs ``pip install
"amtml-fast[hf]"``."""

try:
    from amtml_fast.hf.topk_store import StoredTopK, store_topk
    from amtml_fast.hf.trainer import DistillationTrainer
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("accelerate", "safetensors", "transformers"):
        raise
    missing = f'amtml_fast.hf: the package {package} is missing; pip install "amtml-fast[hf]"'
    raise ModuleNotFoundError(missing, name=package) from None

__all__ = ["DistillationTrainer", "StoredTopK", "store_topk"]
