"""RabbitMQ's hash of a password, as the role's filter makes it."""

from __future__ import annotations

import runpy

from voip_stack import paths

FILTER = runpy.run_path(str(paths.ANSIBLE / "roles/rabbitmq/filter_plugins/rabbitmq.py"))
password_hash, salted = FILTER["password_hash"], FILTER["salted"]


def test_it_is_the_one_of_rabbitmqs_documentation() -> None:
    """https://www.rabbitmq.com/docs/passwords#computing-password-hash"""
    assert salted("test12", bytes.fromhex("908DC60A")) == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"


def test_a_second_run_changes_nothing() -> None:
    assert password_hash("secret", "cdr_reader") == password_hash("secret", "cdr_reader")


def test_who_sees_the_hashes_does_not_see_which_passwords_are_the_same() -> None:
    assert password_hash("secret", "cdr_reader") != password_hash("secret", "cdr_publisher")
