"""What `lotr train`, `evaluate` and `predict` do."""
