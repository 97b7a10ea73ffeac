"""Replay: the verification trace that any drafter would leave on a stored trajectory, without generating anything.

It is exact because verification only compares proposals with the tokens that were committed: from anchor `a` draft a
block, accept the longest prefix equal to the trajectory, move to `a + accepted + 1`.
"""
