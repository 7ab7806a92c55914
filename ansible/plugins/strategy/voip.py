"""The stack's strategy: host_pinned, by way of Mitogen unless VOIP_MITOGEN is `no`.

Mitogen's own shims lie in its package, where no configuration file of ours can point to.
"""

from __future__ import annotations

import os
from typing import Any

if os.environ.get("VOIP_MITOGEN") == "no":
    from ansible.plugins.strategy.host_pinned import StrategyModule
else:
    import ansible_mitogen.loaders
    import ansible_mitogen.strategy

    Base: Any = ansible_mitogen.loaders.strategy_loader.get("host_pinned", class_only=True)

    class StrategyModule(ansible_mitogen.strategy.StrategyMixin, Base):  # type: ignore[misc,no-redef]  # untyped
        """As host_pinned; Mitogen keeps an interpreter on the other side."""


__all__ = ["StrategyModule"]
