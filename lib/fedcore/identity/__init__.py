"""DEVICE IDENTITY: who signed a request, and may its certificate be trusted. Bytes and values only.

pem.py        the two forms in which certificates travel, and the client's id that follows from one
messages.py   the bytes that are signed, for each kind of request
pss.py        signatures of devices: RSASSA-PSS
chain.py      from a request's certificates to the key that signs, by way of the trusted roots
revocation.py which equipment certificates are revoked
freshness.py  time stamps, and the one request that a signature is good for

No clock, no file, no socket: the time is an argument. Both sides use this: servers verify, devices sign.
"""
