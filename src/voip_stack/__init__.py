"""A whole telephony stack in virtual machines, proven with real calls."""
