"""The `bert-cpt` command and the ways to start a run."""
