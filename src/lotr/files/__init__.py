"""What is on disk: safetensors and JSON, whole or not at all."""
