"""The rules of stochastic backpropagation, one per distribution and parameter."""

from gradlab.rules import continuous, counts, finite, levy, mixtures, multivariate, paths
from gradlab.rules.registry import (
    Rule,
    Shift,
    from_log_cf,
    log_mgf,
    register_cumulants,
    register_log_cf,
    register_remainder,
    register_rule,
)

__all__ = [
    "Rule",
    "Shift",
    "from_log_cf",
    "log_mgf",
    "register_cumulants",
    "register_log_cf",
    "register_remainder",
    "register_rule",
]

del continuous, counts, finite, levy, mixtures, multivariate, paths
