"""Healthy models, the defects planted in them, and the tables of tools/diagnosis_trial.py."""
