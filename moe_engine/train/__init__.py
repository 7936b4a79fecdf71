"""What turns a model and data into a run: the step, ZeRO by DeepSpeed, the schedule and the loop."""
