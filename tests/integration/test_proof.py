import pytest

from voip_stack import calls, inventory


@pytest.mark.core
@pytest.mark.alone
@pytest.mark.parametrize("proxy", [m.name for m in inventory.load().group("sip_proxies") if m.external])
def test_a_call_is_heard_both_ways_forwarded_in_the_kernel_and_recorded(stack: inventory.Inventory, proxy: str) -> None:
    assert stack.machines
    print(calls.report(calls.verify(proxy)))  # noqa: T201  # pytest shows it when the test fails
