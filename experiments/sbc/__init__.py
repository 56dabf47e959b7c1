"""Simulation-based calibration of trained models."""
