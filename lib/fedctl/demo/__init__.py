"""`fl demo`: a federation of real processes learns to read handwriting, here and now.

command   options, signals, exit codes; the order of events
plan      what is trained, by whom, and the files that say so
cluster   the processes and the questions that are put to them
certificates   with --tls: those of `fl certs`
report    what came of it: the test set's verdict, JSON, curves
view      what the reader sees meanwhile
"""
