"""The command line. A package of its own, because `lotr --help` answers before torch is imported."""
