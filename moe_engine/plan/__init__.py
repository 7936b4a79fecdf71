"""What a run will be and cost, said before it starts."""
