"""What knows ranks: the mesh, the collectives, cut weights, cut linear layers, and the dispatch of rows to experts."""
