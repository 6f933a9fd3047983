"""Rows of data: where they come from, their columns, tokens and batches."""
