"""Predictions of capacity, time and layouts for a model on given hardware, which need not be present.

It owns the prediction; it must not load weights or start ranks.
"""
