"""Dashboards: every panel, declared once."""
