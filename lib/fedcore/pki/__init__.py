"""CERTIFICATES: making them, and deciding about them. No socket, no Twisted.

authority.py   makes keys, authorities, certificates and revocation lists
chain.py       is a node's own certificate one of its authority? does a certificate bear a name?
revocation.py  which certificates are revoked
expiry.py      what is to be said about the dates of a certificate
"""
