"""Comparisons: many trainings, side by side, and what their results say."""
