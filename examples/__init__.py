"""Example trainers and data sets, readable first; `fl demo` runs them."""
