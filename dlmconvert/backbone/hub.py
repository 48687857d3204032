"""Is the Hub there? Asked once, before its client begins to retry."""

from __future__ import annotations

import os


def hub_reachable(timeout: float = 3.0) -> bool:
    """One HEAD request, without the retries of the Hub client (which take 20 seconds when there is no network).

    timeout: seconds. Imports no torch.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    try:
        from huggingface_hub import constants, get_session

        return get_session().head(constants.ENDPOINT, timeout=timeout).status_code < 500
    except Exception:  # every HTTP library has its own errors, and all of them mean no
        return False
