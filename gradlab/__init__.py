"""Stochastic gradient estimators for PyTorch."""
