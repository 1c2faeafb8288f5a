"""Whether this is the nightly run: wider, and hours long."""

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
NIGHTLY = PROFILE != "ci"
