"""The lab: experiments with ways to train a drafter. It is not installed with the package."""
