"""What INT8 weights change in a model's answers: `rowint8 quality`, `fidelity`, `agreement`."""
