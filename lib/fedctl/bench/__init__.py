"""``fl bench``: what a feature costs on the machine it is run on."""
