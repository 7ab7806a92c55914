"""Phones outside, the measurements of their calls, and the proof that a call works."""

from voip_stack.calls.capture import Capture, Recording
from voip_stack.calls.phone import TONES_HZ, Phone, proxy_address
from voip_stack.calls.proof import Result, report, verify
from voip_stack.calls.sipp import Leg, Refused

__all__ = ["TONES_HZ", "Capture", "Leg", "Phone", "Recording", "Refused", "Result", "proxy_address", "report", "verify"]
