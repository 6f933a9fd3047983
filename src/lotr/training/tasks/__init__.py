"""Many tasks trained at once into a bank."""
