"""What a run says while it runs: console, metrics.jsonl, TensorBoard (logger.py)."""
