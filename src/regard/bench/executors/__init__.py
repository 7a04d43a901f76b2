"""Where cells run: in this process, in processes of this machine, as jobs of Slurm, as actors of Ray."""
