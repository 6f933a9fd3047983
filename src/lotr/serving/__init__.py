"""A bank over HTTP, and in vLLM."""
