"""Speculation: guess the tokens that follow, verify the guesses in one step, keep those that equal what is drawn.

A draw depends on (seed, position) and on logits that do not depend on the batch, so drafts change the speed only.
`speculator` decides how many tokens to draft; the drafters in the other files guess them.
"""
