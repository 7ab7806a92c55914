"""The commands: `invoke --list`. Each noun is a module of voip_stack.tasks; these lines join them."""

from invoke.collection import Collection

from voip_stack import cli
from voip_stack.tasks import (
    calls,
    cdr,
    components,
    doctor,
    images,
    infra,
    lab,
    packages,
    provision,
    roles,
    secrets,
    stack,
    subscribers,
    vms,
)

namespace = Collection(stack.up, stack.status, stack.test, doctor.doctor, provision.provision)
for noun in (vms, images, packages, lab, infra, secrets, calls, cdr, subscribers, components, roles):
    namespace.add_collection(Collection.from_module(noun))
namespace.configure({"run": {"echo": False}})
cli.guarded(namespace)
