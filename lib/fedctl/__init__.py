"""The `fl` command."""
