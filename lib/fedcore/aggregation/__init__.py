"""Arrays to arrays: how updates become a model."""
