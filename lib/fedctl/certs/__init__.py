"""`fl certs`: a certificate authority in a folder, and what is made, looked at and taken back with it.

command   options, passwords, messages
folder    the folder: its files, its index, what it has issued and revoked
display   what is in a file of certificates
checks    is a certificate good, and if not, why
files     files that only the owner may read, and that are never written over by accident
"""
