"""Times of single operators on a GPU, beside their peers: `rowint8 bench kernels`, `rowint8 tune`."""
