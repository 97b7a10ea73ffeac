"""What can be said before a run: one list of findings, which `check` prints and a run raises the first error of."""
