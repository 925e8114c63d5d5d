"""Whether MLflow, Optuna's study and the disk tell the same of every run.

`run_folder` reads the disk, `scene` holds what all places say of one run,
`disagreements` are the rules, `audit` goes through all runs and mends.
"""
