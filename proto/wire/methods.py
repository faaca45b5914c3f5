"""The calls between machines that go over this package, by their names on the wire."""

from google.protobuf.descriptor import MethodDescriptor

from .. import cluster_pb2, experts_pb2


def _name(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


_EXPERTS = experts_pb2.DESCRIPTOR.services_by_name["Experts"].methods_by_name
COMPUTE = _name(_EXPERTS["Compute"])
PASS_ON = _name(_EXPERTS["PassOn"])

_CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].methods_by_name
ATTEND = _name(_CLUSTER["Attend"])
LOCATE = _name(_CLUSTER["Locate"])
HASH_EXPERTS = _name(_CLUSTER["HashExperts"])
FETCH_SLICE = _name(_CLUSTER["FetchSlice"])
RENEW = _name(_CLUSTER["Renew"])

_PEERS = cluster_pb2.DESCRIPTOR.services_by_name["Peers"].methods_by_name
FETCH_SLICE_OF_PEER = _name(_PEERS["FetchSlice"])
