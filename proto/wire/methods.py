"""The calls between machines that go over this package, by their names on the wire."""

from .. import experts_pb2

_EXPERTS = experts_pb2.DESCRIPTOR.services_by_name["Experts"]
COMPUTE = f"/{_EXPERTS.full_name}/{_EXPERTS.methods_by_name['Compute'].name}"
PASS_ON = f"/{_EXPERTS.full_name}/{_EXPERTS.methods_by_name['PassOn'].name}"
