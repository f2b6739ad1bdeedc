"""Where cluster state lives: Redis, its keys and its atomic scripts."""
