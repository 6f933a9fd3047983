"""How an update is made and applied. torch only."""
