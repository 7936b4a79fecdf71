"""The decoder: the only place where ops (kernels) and parallel (ranks) meet."""
