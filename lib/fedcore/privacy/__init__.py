"""What a device does to its update so that nobody learns its data from it: noise, or a few directions only."""
