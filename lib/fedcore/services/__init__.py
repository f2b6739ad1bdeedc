"""One Twisted service per file; the thin shell around the pure packages."""
