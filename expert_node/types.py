"""The nouns that the node's parts share."""


class NodeError(Exception):
    """Something a person must know; its text is one sentence that says what is wrong and what to do."""


class ConfigError(NodeError):
    """A setting that cannot be; the process ends with exit code 2."""
