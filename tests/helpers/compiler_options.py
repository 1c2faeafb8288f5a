"""Options of XLA's compiler that several tests share."""

from typing import Any

# Without LLVM's optimizations: XLA fuses loops as ever, and compiles in half the time.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}

# In addition, every operation rounds as NumPy does: no approximated functions, and
# bfloat16 is rounded between two operations.
STRICT: dict[str, Any] = {
    **QUICK,
    "xla_cpu_enable_platform_dependent_math": False,
    "xla_allow_excess_precision": False,
}

# As a user's program is compiled, whatever the test session sets.
DEFAULT: dict[str, Any] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
