"""Secrets in files of this computer, generated at first use; certificates of its own CA."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from voip_stack import files, settings
from voip_stack.components import Secret
from voip_stack.secrets.store import Dated, catalogue, generate


class FileProvider:
    """See Provider. One file of mode 0600 per secret, named after it."""

    by_agent = False

    @property
    def place(self) -> str:
        return str(settings.load().secrets_dir)

    def where(self, secret: Secret) -> str:
        return str(self._file(secret))

    def _file(self, secret: Secret) -> Path:
        return settings.load().secrets_dir / secret.name

    def get(self, secret: Secret) -> str:
        """Generated when it is missing, once even if several processes ask at the same time."""
        file = self._file(secret)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.write_new(file, generate() + "\n")
        return (file.read_text().split() or [""])[0]

    def put(self, secret: Secret, value: str) -> None:
        files.write(self._file(secret), value + "\n")

    def certificate(self, _role: str, name: str, others: Sequence[str] = (), addresses: Sequence[str] = ()) -> str:
        from voip_stack.secrets import certificates  # noqa: PLC0415  # takes half a second, needed only here

        return certificates.get(name, others, addresses)

    def authority(self) -> str:
        from voip_stack.secrets import certificates  # noqa: PLC0415  # as above

        return certificates.authority()

    def dated(self) -> list[Dated]:
        from voip_stack.secrets import certificates  # noqa: PLC0415  # as above

        found = []
        for secret in catalogue().values():
            file = self._file(secret)
            made = datetime.fromtimestamp(file.stat().st_mtime, UTC) if file.exists() else None
            found.append(Dated(secret.name, str(file), made))
        ends = certificates.ends().items()
        return found + [Dated(f"certificate {name}", "this computer's CA", ends=end) for name, end in ends]
