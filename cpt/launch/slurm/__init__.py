"""Stages as batch jobs of Slurm.

options.py      the cluster's facts, as a person gives them in `conf/launcher/<cluster>.yaml`; the launcher itself
script.py       options and a stage to a complete batch script (`job.sbatch.j2`)
commands.py     sbatch, scancel, scontrol
states.py       what the cluster says about jobs
"""

from cpt.launch.slurm import options  # noqa: F401
