"""What the estimators need to know about a distribution, and the two distributions that torch lacks."""

from __future__ import annotations
