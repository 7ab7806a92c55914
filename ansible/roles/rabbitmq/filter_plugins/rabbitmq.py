"""RabbitMQ's hash of a password."""

from __future__ import annotations

import base64
import hashlib
import hmac


def password_hash(password: str, user: str) -> str:
    """The hash as rabbit_password_hashing_sha256 makes it (https://www.rabbitmq.com/docs/passwords).

    The salt follows from both: a second run changes nothing, and equal passwords have different hashes.
    """
    return salted(password, hmac.digest(password.encode(), user.encode(), "sha256")[:4])


def salted(password: str, salt: bytes) -> str:
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, object]:
        return {"rabbitmq_password_hash": password_hash}
