"""Times that both sides of the cluster's control stream keep to; seconds."""

HEARTBEAT_SECONDS = 2.0  # a node reports this often
SILENCE_SECONDS = 10.0  # after so long without any report the coordinator calls a node away
RELEASE_SECONDS = 10.0  # after so long without a Release a node that was asked to stop goes anyway
