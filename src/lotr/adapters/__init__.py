"""A saved adapter, from its folder: inspection, export, pictures."""
