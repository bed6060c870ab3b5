"""executor=slurm: a run as a SLURM batch job."""
