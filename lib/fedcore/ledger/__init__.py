"""Where accepted updates live until their model is published."""
