from fusetune.optim.adamw import AdamW

__all__ = ["AdamW"]
