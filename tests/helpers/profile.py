"""The Hypothesis profile of this run, which also says whether it is the nightly one.

`ci`, the default, draws few examples and the same in every run. `nightly` draws many,
different ones every time, and includes the tests marked `slow`.
"""

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
NIGHTLY = PROFILE != "ci"
