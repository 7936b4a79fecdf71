"""What a run asks of the machine that it is on: memory, signals, a lock, and a watch over its own progress."""
