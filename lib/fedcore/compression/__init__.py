"""Weights in fewer bytes: 8 bits a value, and of updates only a part that both sides choose alike."""
