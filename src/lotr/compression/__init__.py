"""Many LoRAs into one bank."""
