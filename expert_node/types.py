"""The nouns that the node's parts share."""


class NodeError(Exception):
    """Something a person must know; its text is one sentence that says what is wrong and what to do."""


class GpuFailed(NodeError):
    """A GPU could not compute a request; it has given up some or all of its experts, for the CPU to compute."""


class ConfigError(NodeError):
    """A setting that cannot be; the process ends with exit code 2."""
