"""Which sites share what, from names and shapes alone."""
