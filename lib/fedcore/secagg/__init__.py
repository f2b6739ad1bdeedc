"""Secure aggregation by pairwise masks: keys, masks, shares of secrets, and taking masks off again.

Pure: bytes and arrays in, bytes and arrays out. Chance comes in as an argument, nothing is remembered between calls,
and the heavy functions leave the interpreter's lock to others while they work: call them in threads.
"""
