"""TLS of all links: files become contexts, contexts make connections.

    policy.py    versions, suites, security level: what holds for every context
    files.py     PKCS#12 files, authorities: read, and refused in the original's words
    peers.py     what a peer's certificate must be, beside leading to our authority
    material.py  all contexts of a daemon, made from its files together
    links.py     what makes connections of them, and goes on with others after a renewal
    redis.py     the link to Redis and the Sentinels

A peer that we connect to is always verified, its name included.
"""

from fedcore.net.tls.links import Links, explain
from fedcore.net.tls.material import HttpListener, Material, NodeLinks, Sources, make
from fedcore.net.tls.policy import SUITES
from fedcore.net.tls.redis import RedisFiles, redis_contexts

__all__ = [
    "SUITES",
    "HttpListener",
    "Links",
    "Material",
    "NodeLinks",
    "RedisFiles",
    "Sources",
    "explain",
    "make",
    "redis_contexts",
]
