"""Stages as batch jobs of Slurm."""
