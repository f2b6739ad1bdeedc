"""The daemons; each file only builds services and starts them."""
