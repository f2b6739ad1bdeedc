"""Where cluster state lives: Redis, the link to it, its keys and its atomic scripts."""
