"""Everything that prints or draws results."""
