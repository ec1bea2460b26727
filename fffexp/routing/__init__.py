"""Pure functions on tensors: how samples are assigned to leaves and experts."""
