"""The thin shell around the pure packages: one service, or one of its parts, per file."""
