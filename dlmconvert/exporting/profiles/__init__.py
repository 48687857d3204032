"""One object a target format. A new target is a new file here and a line in PROFILES."""

from __future__ import annotations

from dlmconvert.errors import UserError, nearest
from dlmconvert.exporting.profiles.native import NATIVE
from dlmconvert.exporting.profiles.profile import Profile

PROFILES = {profile.name: profile for profile in (NATIVE,)}


def find_profile(name: str) -> Profile:
    if name not in PROFILES:
        raise UserError(f"export.profile={name!r} is no export format", nearest(name, PROFILES), "see docs/formats.md")
    return PROFILES[name]
